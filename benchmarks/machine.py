"""Describe the machine of a measurement and the speed of matrix products."""

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

from benchmarks.timing import seconds_of, seconds_on_card

ROOT = Path(__file__).parent.parent


def pin_threads(module: str) -> None:
    """Restart the module with one thread pinned to each core.

    Unpinned threads make times jump.
    """
    if "OMP_PLACES" in os.environ:
        return
    places = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))
    environment = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": places}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def facts() -> dict[str, Any]:
    """Return processor, threads, versions and commit."""
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
    """Return the error in one line."""
    return ": ".join([type(failure).__name__, *str(failure).splitlines()[:1]])


def roof(dtype: torch.dtype, size: int = 1024, rounds: int = 15) -> float:
    """Return the best FLOP/s of PyTorch's square matrix product.

    It uses all threads.
    """
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(rounds))


def card() -> dict[str, Any]:
    """Return the CUDA card and the versions of its software."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def peak_on_card(call: Callable[[], Any], device: str = "cuda") -> float:
    """Measure the MB that a call allocates beyond those in use."""
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def roof_on_card(dtype: torch.dtype, size: int = 8192, rounds: int = 20) -> float:
    """Return the best FLOP/s of PyTorch's square matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return float(2 * size**3 / min(seconds_on_card(lambda: a @ b) for _ in range(rounds)))


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
