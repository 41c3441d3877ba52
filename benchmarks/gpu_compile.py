"""Compile the Triton kernels for cards that are not at hand: `python -m benchmarks.gpu_compile`.

Triton and its ptxas compile for a compute capability without a device. Every kernel is compiled with every choice of
block sizes that tuning tries. Registers, spills and shared memory are read from the machine code. No speed is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import machine, report
from benchmarks.output import write_json
from structattn import Hierarchy
from structattn.layers import default_ranks, default_windows
from structattn.ops.call import Call, DecodeCall
from structattn.ops.triton import backward_kernels, decode_kernels, forward_kernel, launch

SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may take (CUDA C++ Programming Guide, table of compute capabilities)."""

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LENGTH, _HEADS = 4096, 2
NEAR_AND_FAR = Hierarchy((32, 32, 64), windows=(None, 1024, 256), value_ranks=(32, 32, 64))
"""Far keys and values have a quarter of their dimensions."""
HIERARCHIES = [
    Hierarchy.flat(64),
    Hierarchy(default_ranks(64, _LENGTH), windows=default_windows(8, _LENGTH)),
    Hierarchy.dyadic((32, 32), _LENGTH),
    Hierarchy.flat(128),
    NEAR_AND_FAR,
    Hierarchy.flat(256),
    Hierarchy.flat(512),
]


@dataclass(frozen=True)
class Compiled:
    """One kernel with one choice of block sizes."""

    kernel: str
    capability: int
    rank: int
    levels: int
    blocks: str
    """Block sizes, queries by keys, then warps and stages."""
    registers: int
    """Registers per thread, at most 255."""
    spilled: int
    """Bytes of local memory per thread: values that did not fit in registers."""
    shared: int
    """Bytes of shared memory per block."""
    products: str
    """Instruction of matrix products: `wgmma` (Hopper), `mma` (older cards) or `none`."""
    copied: int
    """Fewest bytes of a copy from global to shared memory ahead of its use; 0 where there is none."""
    narrow_loads: int
    """Loads of 2 bytes, a number of half precision."""
    hierarchy: str = ""
    """The levels as text."""

    @property
    def fits(self) -> bool:
        """True if the card has as much shared memory."""
        return self.shared <= SHARED_LIMITS[self.capability]


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile kernels for `capability` instead of running them, inside a `with` block."""
    made: list[Compiled] = []
    run, active = JITFunction.run, driver._active

    def compile_one(kernel: Any, *arguments: Any, **options: Any) -> None:
        options |= {"grid": (1,), "warmup": True}
        made.append(_read(kernel, capability, run(kernel, *arguments, **options), options))

    def compile_each(kernel: Any, name: str, row: int) -> _Launches:
        return _Launches(lambda **options: _compile_row(kernel, name, row, options))

    driver.set_active(_NoCard(capability))
    try:
        with patch.object(JITFunction, "run", compile_one), patch.object(launch, "tuned", compile_each):
            yield made
    finally:
        driver._active = active


def calls(
    rank: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, hierarchy: Hierarchy | None = None
) -> dict[str, Callable[[], object]]:
    """Return causal forward, backward and decode calls.

    `r = dv`, with values of at most 256 dimensions. The blocks of the hierarchy halve, unless one is given.
    """
    query, key = (torch.empty(1, _HEADS, _LENGTH, rank, dtype=dtype) for _ in range(2))
    value = torch.empty(1, _HEADS, _LENGTH, min(rank, 256), dtype=dtype)
    lse = torch.empty(1, _HEADS, _LENGTH)
    hierarchy = Hierarchy.dyadic(ranks, _LENGTH) if hierarchy is None else hierarchy
    call = Call(query, key, value, None, None, None, None, hierarchy, True, rank**-0.5, 0, 0.0)
    key_levels = [level.mT.contiguous() for level in key.split(ranks, dim=-1)]
    value_levels = [level.contiguous() for level in value.split(list(call.value_widths), dim=-1)]
    starts = [0] * len(ranks)
    decode_call = DecodeCall(query[:, :, :1], key_levels, value_levels, None, hierarchy, _LENGTH, starts, call.scale)
    return {
        "forward": lambda: forward_kernel.forward(call),
        "backward": lambda: backward_kernels.backward(call, value, value, lse, needs_bias_grad=False),
        "decode": lambda: decode_kernels.decode(decode_call),
    }


class _NoCard:
    """A driver without a card.

    Each capability is a device of its own, since kernels are cached by device.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class _Launches:
    """Replaces a tuned kernel: `kernel[grid](...)` calls `launch_one`."""

    def __init__(self, launch_one: Callable[..., None]) -> None:
        self.launch_one = launch_one
        self.cache: dict[object, object] = {}  # of choices: nothing is tuned

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch_one


def _compile_row(kernel: Any, name: str, row: int, options: dict[str, Any]) -> None:
    """Compile every choice of block sizes that tuning would time."""
    for config in launch.configs(name, row):
        chosen = options | config.all_kwargs()
        kernel.run(**chosen, EVEN=launch.is_even(chosen, name))


def _read(kernel: Any, capability: int, compiled: Any, options: dict[str, Any]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    ranks = options.get("RANKS", ())
    sizes = [str(options[name]) for name in ("BLOCK_Q", "BLOCK_K") if name in options]
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (\w+)(?:, %\w+)?;", ptx)
    return Compiled(
        kernel=kernel.__name__,
        capability=capability,
        rank=sum(ranks),
        levels=len(ranks),
        blocks=" x ".join(sizes) + f", {compiled.metadata.num_warps}, {compiled.metadata.num_stages}",
        registers=registers,
        spilled=stack,
        shared=compiled.metadata.shared,
        products=next((name for name in ("wgmma", "mma") if f"{name}." in ptx), "none"),
        copied=min((int(size, 0) for size in copies), default=0),
        narrow_loads=len(re.findall(r"ld\.global\S*\.[bu]16", ptx)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90], choices=list(SHARED_LIMITS))
    parser.add_argument("--hierarchies", type=Hierarchy.parse, nargs="+", default=HIERARCHIES)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "docs/results/gpu-compiled.json")
    options = parser.parse_args()
    rows: list[Compiled] = []
    for capability in options.capabilities:
        for hierarchy in options.hierarchies:
            for launched in calls(hierarchy.rank, hierarchy.ranks, hierarchy=hierarchy).values():
                with compiling(capability) as made:
                    launched()
                made = [replace(row, hierarchy=str(hierarchy)) for row in made]
                rows += made
                print(*made, sep="\n", flush=True)
    limits = {capability: SHARED_LIMITS[capability] for capability in options.capabilities}
    facts = {**machine.facts(), "triton": triton.__version__}
    result = {**facts, "limits": limits, "rows": [asdict(row) for row in rows]}
    write_json(result, options.out)
    report.render(options.out)


if __name__ == "__main__":
    main()
