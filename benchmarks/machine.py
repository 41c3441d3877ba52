"""What a measurement depends on: the machine, versions, the commit, where threads run, how fast products are."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
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


def roof(dtype: torch.dtype, size: int = 1024, rounds: int = 15) -> float:
    """FLOP/s of PyTorch's product of two square matrices, with all threads: the best of some rounds."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


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
