"""What a measurement depends on: the machine, versions, the commit, where threads run, how fast products are."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def pin_threads(module: str) -> None:
    """Start over with one thread bound to each core: unpinned, times snap to the scheduler's steps."""
    if "OMP_PLACES" in os.environ:
        return
    places = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))
    environment = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": places}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def facts() -> dict[str, Any]:
    """Machine, versions, commit and pinning."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in _flags()],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "pinning": os.environ.get("OMP_PLACES"),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--", "src", "benchmarks").splitlines(),
    }


def reason(failure: Exception) -> str:
    """Why a variant cannot run, in one line."""
    return ": ".join([type(failure).__name__, *str(failure).splitlines()[:1]])


def roof(dtype: torch.dtype, size: int = 1024, rounds: int = 15) -> float:
    """FLOP/s of PyTorch's product of two square matrices, with all threads: the best of some rounds."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def card() -> dict[str, Any]:
    """The CUDA card, and the versions that go with it."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def time_on_card(call: Callable[[], Any], device: str = "cuda") -> float:
    """Milliseconds of one call, by the card's own clock where there is one."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    # 256 MB written in between push what the last call left out of the card's cache.
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def peak_on_card(call: Callable[[], Any], device: str = "cuda") -> float:
    """MB that one call takes beyond what is there already."""
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def roof_on_card(dtype: torch.dtype, size: int = 8192, rounds: int = 20) -> float:
    """FLOP/s of PyTorch's product of two square matrices of random numbers: the best of some rounds."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return float(2 * size**3 / min(time_on_card(lambda: a @ b) / 1e3 for _ in range(rounds)))


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
