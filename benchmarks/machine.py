"""Describe the machine of a measurement and the speed of matrix products."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import seconds_on_card
from structattn.comparison.environment import processor
from structattn.ops.cpu import prebuilt

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {
    "native": {},
    "avx512_bf16": {
        "STRUCTATTN_KERNEL": "source",
        "STRUCTATTN_CXXFLAGS": "-march=x86-64-v4 -mavx512bf16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
    "avx512": {
        "STRUCTATTN_KERNEL": "source",
        "STRUCTATTN_CXXFLAGS": "-march=x86-64-v4",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx2": {
        "STRUCTATTN_KERNEL": "source",
        "STRUCTATTN_CXXFLAGS": "-march=haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
"""Environment that holds the kernel, PyTorch and its libraries to a set of instructions, by name."""
_INSTRUCTION_FLAGS = {
    "native": ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16"),
    "avx512_bf16": ("avx2", "avx512f", "avx512_bf16"),
    "avx512": ("avx2", "avx512f"),
    "avx2": ("avx2",),
}
"""Flags of /proc/cpuinfo that a run reports, by the name of its instructions."""
_USED = "STRUCTATTN_BENCHMARK_INSTRUCTIONS"
CORES = frozenset(map(int, re.findall(r"\d+", os.environ.get("OMP_PLACES", "")))) or frozenset(os.sched_getaffinity(0))
"""Cores that a run may use. OpenMP has pinned the main thread to one of its places when torch is imported."""


def pin_threads(module: str, instructions: str = "native") -> None:
    """Restart the module with a thread pinned to each core.

    It is held to `instructions`. Unpinned threads make times jump.

    Raises:
        SystemExit: the processor lacks the instructions.
    """
    missing = set(_INSTRUCTION_FLAGS[instructions]) - prebuilt.instructions() if instructions != "native" else set()
    if missing:
        raise SystemExit(f"--instructions {instructions}: this processor has no {', '.join(sorted(missing))}")
    if "OMP_PLACES" in os.environ and _used() == instructions:
        return
    places = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))
    environment = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": places}
    environment |= INSTRUCTIONS[instructions] | {_USED: instructions}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def facts() -> dict[str, Any]:
    """Return processor, instructions in use, threads, versions and commit."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": processor(),
        "held_to": _used(),
        "instructions": [name for name in _INSTRUCTION_FLAGS[_used()] if name in prebuilt.instructions()],
        "environment": {
            name: os.environ[name] for name in ("CXX", *INSTRUCTIONS["avx2"], "OMP_NUM_THREADS") if name in os.environ
        },
        "cores": len(CORES),
        "threads": torch.get_num_threads(),
        "pinning": os.environ.get("OMP_PLACES"),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed_files": _git("status", "--porcelain", "--", "src", "benchmarks").splitlines(),
    }


def is_x86() -> bool:
    """True on an x86-64 processor."""
    return platform.machine() in ("x86_64", "AMD64")


def reason(failure: Exception) -> str:
    """Return the error in one line."""
    return ": ".join([type(failure).__name__, *str(failure).splitlines()[:1]])


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


def _used() -> str:
    return os.environ.get(_USED, "native")


def _git(*arguments: str) -> str:
    """Return the output of git, or nothing outside a checkout.

    On a card's machine the files are in none.
    """
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
