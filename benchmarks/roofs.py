"""Measure this machine's roofs: multiply-add in registers, products in cache, and reading memory.

No kernel can be above the first and the last. The loops are in `roofs.cpp`, compiled with the instructions that the
attention kernel may use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.timing import seconds_of

UNITS = {
    "float32": {"float32 FMA": "float32_fma"},
    "bfloat16": {"bfloat16 AVX512_BF16": "bfloat16_avx512", "bfloat16 AMX": "bfloat16_amx"},
}
"""Units that multiply in each dtype, and their loops in `roofs.cpp`."""
LARGE = 2**30
"""Bytes of the array of the memory roof, more than the caches of usual machines."""
_CACHED_SIZES = (64, 96, 128, 192, 256, 384)
_SECONDS_PER_LOOP = 0.02
_STREAMS = (1, 8)
_READ_UNIT = 512 * max(_STREAMS)


def measure() -> dict[str, Any]:
    """Return the roofs in FLOP/s and bytes/s, on all threads.

    Returns:
        `units`, the rate of each multiply-add unit that this machine has; `product_in_cache` by dtype, PyTorch's best
        rate; `memory`, the rate of reading an array of `LARGE` bytes.
    """
    units = {name: unit_rate(loop) for loops in UNITS.values() for name, loop in loops.items()}
    return {
        "units": {name: rate for name, rate in units.items() if rate},
        "product_in_cache": {
            name: product_in_cache(dtype) for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        "memory": read_rate(LARGE, rounds=5),
    }


def higher(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the higher of two measurements of each roof: the machine was slowed in the other."""
    return {
        name: higher(value, second[name]) if isinstance(value, Mapping) else max(value, second[name])
        for name, value in first.items()
    }


def product_roof(roofs: Mapping[str, Any], dtype: str) -> float | None:
    """Return the highest rate known for products in a dtype.

    That is the rate of the fastest unit, or of PyTorch's product if the machine was slower while a unit was measured. A
    bfloat16 product may run in float32. None where a
    machine's bfloat16 unit is not known here (Arm).
    """
    units = roofs["units"]
    known = [units[name] for name in UNITS[dtype] if name in units]
    if dtype == "bfloat16" and machine.is_x86():
        known.append(units["float32 FMA"])
    return max(*known, roofs["product_in_cache"][dtype]) if known else None


def unit_rate(loop: str, rounds: int = 5) -> float:
    """Return the best FLOP/s of a loop of `roofs.cpp`.

    It runs on all threads at once; 0 without the instruction.
    """
    function = getattr(_library(), loop)
    function.restype = ctypes.c_double
    done = function(ctypes.c_int64(1000))
    if not done:
        return 0.0
    trial = 100_000
    repeats = int(trial * _SECONDS_PER_LOOP / max(seconds_of(lambda: function(ctypes.c_int64(trial))), 1e-6))
    flops = done / 1000 * repeats * torch.get_num_threads()
    return flops / min(_seconds_on_all_threads(lambda _: function(ctypes.c_int64(repeats))) for _ in range(rounds))


def read_rate(size: int, rounds: int = 9) -> float:
    """Return the best bytes/s of all threads reading one array repeatedly.

    The array has about `size` bytes. An array that fits a cache comes from there, as it does in a kernel that is called
    again and again.
    """
    threads = torch.get_num_threads()
    part = max(round(size / threads / _READ_UNIT), 1) * _READ_UNIT
    array = torch.zeros(part * threads, dtype=torch.uint8)
    read = _library().read_memory

    def run(thread: int, streams: int) -> None:
        read(ctypes.c_void_p(array.data_ptr() + thread * part), ctypes.c_int64(part), ctypes.c_int64(streams))

    seconds = [
        _seconds_on_all_threads(functools.partial(run, streams=streams)) for streams in _STREAMS for _ in range(rounds)
    ]
    return part * threads / min(seconds)


def product_in_cache(dtype: torch.dtype, rounds: int = 9) -> float:
    """Return PyTorch's best FLOP/s over square products that fit the caches."""
    best = 0.0
    for size in _CACHED_SIZES:
        # Some products per thread, so that the threads' start does not count.
        batch = torch.get_num_threads() * max(1, (256 // size) ** 2)
        a, b = (torch.randn(batch, size, size).to(dtype) for _ in range(2))
        torch.bmm(a, b)
        seconds = min(seconds_of(lambda a=a, b=b: torch.bmm(a, b)) for _ in range(rounds))
        best = max(best, 2 * batch * size**3 / seconds)
    return best


def _seconds_on_all_threads(run: Callable[[int], object]) -> float:
    """Return the seconds from the common start to the last end.

    `run(thread)` runs on every core.
    """
    threads = torch.get_num_threads()
    cores = sorted(machine.CORES)
    start, spans = threading.Barrier(threads), [(0.0, 0.0)] * threads

    def work(thread: int) -> None:
        os.sched_setaffinity(0, {cores[thread % len(cores)]})
        start.wait()
        begun = time.perf_counter()
        run(thread)
        spans[thread] = begun, time.perf_counter()

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(begun for begun, _ in spans)


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """Return the compiled loops. The kernel's compiler and flags make them."""
    target = "-march=native" if machine.is_x86() else "-mcpu=native"
    extra = shlex.split(os.environ.get("STRUCTATTN_CXXFLAGS", ""))
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "roofs.so"
        flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", target, *extra]
        subprocess.run([*compiler, *flags, str(Path(__file__).with_suffix(".cpp")), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))
