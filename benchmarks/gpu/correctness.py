"""Part 1: check every kernel on the card against the definition in float64, by the battery of the op's tests.

`tests/test_gpu_correctness.py` holds these cases to every branch of every kernel. Cases go from those that tell most to
those that tell least. Each is run twice: the first call compiles, and both must give the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setup import Setup, compile_times, one_choice_of_blocks
from benchmarks.gpu.workers import Job, Stage
from benchmarks.output import Row
from structattn.ops import Hierarchy
from tests.ops import battery, decode_battery
from tests.ops.battery import BLOCK_VALUES, DEEP, EQUAL, FLAT, NEAR, ODD, SLIDING, WITHIN, Case
from tests.ops.decode_battery import DecodeCase
from tests.tolerance import Deviation

SECONDS = 240.0
"""Time of the part on a card."""
CHOICES = 4
"""Most choices of block sizes that tuning tries for a kernel."""

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GOAL = Hierarchy((32, 32, 64), windows=(None, 1024, 256), value_ranks=(32, 32, 64))
"""The levels of the speed goals: windows of 1024 and 256 in keys and values."""
DEFAULT = Hierarchy((8,) * 8, windows=(None, 512, 256, 128, 64, 32, 16, 8), value_ranks=(8,) * 8)
"""The levels of plain `mlr` at a head width of 64 and 1024 tokens."""
WIDE = Hierarchy((260, 40), (None, 32), "mean")
WIDE_WINDOWS = Hierarchy((260, 40), windows=(70, 9), value_ranks=(10, 30))
BANDS = Hierarchy((8, 8, 4), windows=(384, 192, 64), value_ranks=(4, 0, 4))
CLOSE = Hierarchy((8, 8, 8, 8), windows=(None, 600, 560, 9), value_ranks=(8, 8, 8, 8))
"""Two edges of windows closer together than a tile."""
ONE: dict[str, Any] = {"batch": 1, "heads": 1, "key_heads": 1}
FULL = (True, True, True, True)

TELLING: dict[str, Case | DecodeCase] = {
    "one level": Case(FLAT, 256, dtype=BF16, **ONE),
    "goal": Case(GOAL, 1536, dtype=BF16, value_width=128, **ONE),
    "decode, goal": DecodeCase(GOAL, 1, 3000, heads=8, key_heads=2, dtype=BF16),
    "decode, aligned": DecodeCase(GOAL, 1, 3008, heads=8, key_heads=2, aligned=True, dtype=BF16),
    "decode, one level": DecodeCase(Hierarchy.flat(128), 1, 3000, heads=8, key_heads=2, width=128, dtype=BF16),
    "default": Case(DEFAULT, 700, dtype=BF16, **ONE),
    "blocks": Case(DEEP, 512, dtype=BF16, **ONE),
    "equal blocks": Case(EQUAL, 257, dtype=BF16, **ONE),
    "one level, r = 128": Case(Hierarchy.flat(128), 300, dtype=BF16, value_width=128, **ONE),
    "goal, float16": Case(GOAL, 1500, dtype=FP16, value_width=128, **ONE),
    "goal, float32": Case(GOAL, 1500, value_width=128, **ONE),
    "blocks, float16": Case(DEEP, 300, dtype=FP16, **ONE),
    "blocks, float32": Case(DEEP, 300, **ONE),
    "goal, padding and groups": Case(
        GOAL, 700, value_width=128, dtype=BF16, batch=2, heads=4, key_heads=2, key_start=(0, 31), key_end=(650, 700)
    ),
    "default, decode": DecodeCase(DEFAULT, 1, 2000, heads=2, key_heads=2, dtype=BF16),
    "decode of blocks": DecodeCase(DEEP, 3, 700, (0, 30), 6, 2, dtype=BF16),
}
BRANCHES: dict[str, Case | DecodeCase] = {
    "bias": Case(ODD, 130, bias=FULL, dtype=BF16),
    "bias of a head, windows": Case(NEAR, 130, heads=4, bias=(False, True, True, True), dtype=BF16),
    "groups, bias": Case(ODD, 66, heads=8, bias=FULL, value_width=20),
    "padding": Case(ODD, 257, batch=3, dtype=BF16, key_start=(0, 50, 200), key_end=(257, 257, 255)),
    "padding, float32": Case(DEEP, 100, batch=3, key_start=(0, 50, 100), key_end=(100, 50, 100), is_causal=False),
    "padding, windows": Case(
        NEAR, 257, batch=4, dtype=BF16, key_start=(0, 50, 200, 257), key_end=(257, 257, 255, 257), bias=FULL
    ),
    "offset": Case(DEEP, 100, 357, 203, dtype=BF16),
    "offset, windows": Case(NEAR, 100, 357, 203, dtype=FP16, is_causal=False),
    "offset and padding": Case(WITHIN, 33, 190, 157, False, 2, 1, batch=2, key_start=(50, 3), key_end=(170, 190)),
    "not causal, even": Case(DEEP, 256, is_causal=False, dtype=BF16, **ONE),
    "not causal, windows": Case(NEAR, 384, is_causal=False, dtype=BF16, **ONE),
    "dropout": Case(ODD, 130, dropout_p=0.3, dtype=BF16),
    "dropout, windows": Case(WITHIN, 130, dropout_p=0.3),
    "bands": Case(BANDS, 448, value_width=8, dtype=BF16, **ONE),
    "bands, not causal": Case(BANDS, 448, value_width=8, is_causal=False, **ONE),
    "close bands": Case(CLOSE, 900, value_width=32, dtype=BF16, **ONE),
    "sliding": Case(SLIDING, 300, dtype=BF16, key_end=(300, 50)),
    "sinks": Case(NEAR.with_sinks(3), 257, batch=3, dtype=BF16, key_start=(0, 50, 200), key_end=(257, 257, 202)),
    "blocks in values": Case(BLOCK_VALUES, 257, dtype=BF16, is_causal=False),
    "blocks in values, padding": Case(BLOCK_VALUES, 66, heads=2, key_heads=1, key_start=(0, 31), key_end=(61, 66)),
    "small levels": Case(WITHIN, 200, dtype=BF16),
    "queries past keys": Case(WITHIN, 170, 33, is_causal=False, dtype=BF16),
    "large scores": Case(NEAR, 257, scale=0.5, dtype=BF16, **ONE),
    "strided": Case(NEAR, 257, strided=True, bias=(True, False, True, True), dtype=BF16),
    "wide rows": Case(WIDE, 140, dtype=BF16, **ONE),
    "wide rows, float32": Case(WIDE, 66, **ONE),
    "wide rows, windows": Case(WIDE_WINDOWS, 140, value_width=40, dtype=BF16, **ONE),
    "decode, float32": DecodeCase(GOAL, 3, 1500, (0, 280), 4, 2),
    "decode, float16": DecodeCase(BLOCK_VALUES, 1, 300, None, 4, 2, dtype=FP16),
    "decode, aligned, padding": DecodeCase(GOAL, 2, 3008, (0, 70), 4, 2, aligned=True, dtype=FP16),
    "decode, aligned, float32": DecodeCase(DEFAULT, 1, 2048, aligned=True),
    "decode, finite windows": DecodeCase(WIDE_WINDOWS, 3, 290, (0, 280), 4, 2, dtype=BF16),
    "decode of wide rows": DecodeCase(Hierarchy((200, 90), (None, 16)), 1, 40, dtype=BF16),
    "decode of wide rows, float32": DecodeCase(Hierarchy((200, 90), (None, 16)), 1, 40),
    "one token": Case(NEAR, 1, dtype=BF16),
}
BY_WIDTH = {
    f"r = {rank}, {str(dtype).removeprefix('torch.')}": Case(
        Hierarchy.dyadic((rank // 2, rank // 4, rank // 8, rank // 8), 512),
        300,
        dtype=dtype,
        value_width=min(rank, 256),
        **ONE,
    )
    for dtype, ranks in ((BF16, (64, 128, 256, 1024)), (FP32, (64, 512)))
    for rank in ranks
}
"""Every choice of block sizes is tried with these."""
BY_DTYPE = {
    f"r = {rank}, {str(dtype).removeprefix('torch.')}": Case(
        Hierarchy.dyadic((rank // 2, rank // 2), 512), 140, dtype=dtype, value_width=min(rank, 256), **ONE
    )
    for dtype in (FP32, FP16)
    for rank in (32, 64, 128, 256, 512)
}
"""Every row of the tables of block sizes."""

TINY: dict[str, Case | DecodeCase] = {
    "one level": Case(FLAT, 65, **ONE),
    "goal": Case(replace(GOAL, windows=(None, 64, 16)), 100, value_width=128, dtype=FP16, **ONE),
    "decode": DecodeCase(GOAL, 1, 100, heads=4, key_heads=2),
    "dropout": Case(ODD, 66, dropout_p=0.3, **ONE),
}
"""Cases of a rehearsal."""


def stages(setup: Setup, document: Row) -> list[Stage]:
    """Return the checks, several at a time.

    Most of their time is the compiler's.
    """
    return [Stage(jobs(setup), setup.processes)]


def jobs(setup: Setup) -> list[Job]:
    """Return the checks, those first that tell most."""
    if setup.rehearse:
        return [_job(name, case, 0, setup) for name, case in TINY.items()]
    found = [_job(name, case, 0, setup) for name, case in (TELLING | BRANCHES | BY_DTYPE).items()]
    return found + [
        _job(f"{name}, choice {index}", case, index, setup)
        for index in range(CHOICES)
        for name, case in BY_WIDTH.items()
    ]


def _job(name: str, case: Case | DecodeCase, blocks: int, setup: Setup) -> Job:
    about = {"inputs": describe(case), "dtype": str(case.dtype).removeprefix("torch."), "blocks": blocks}
    return Job(name, check, (replace(case, device=setup.device), blocks), about)


def describe(case: Case | DecodeCase) -> str:
    """Return a case's fields off their default, and its seed."""
    fields = [str(case.hierarchy)]
    for name, default in type(case).__dataclass_fields__.items():
        value = getattr(case, name)
        if name not in ("hierarchy", "device", "dtype") and value != default.default:
            fields.append(f"{name}={value}")
    return ", ".join(fields) + ", seed=0"


def check(setup: Setup, case: Case | DecodeCase, blocks: int) -> Iterator[Row]:
    """Yield a case's errors against the definition, and two calls' seconds."""
    with one_choice_of_blocks(blocks), compile_times() as kernels, _poisoned_memory():
        first, first_seconds = _timed(lambda: outputs(case))
        again, second_seconds = _timed(lambda: outputs(case))
    deviations = compare(case, first)
    reasons = [each.message for each in deviations if each.message is not None]
    reasons += [f"{name}: differs from run to run" for name, each in first.items() if not _equal(each, again[name])]
    row = {"first_seconds": first_seconds, "second_seconds": second_seconds, "kernels": kernels}
    row["results"] = [_numbers(each) for each in deviations]
    yield row | (
        {"reason": "; ".join(reasons)} if reasons else {"shown": _shown(first_seconds, second_seconds, deviations)}
    )


def outputs(case: Case | DecodeCase) -> dict[str, Tensor]:
    """Return output and gradients by the Triton kernels."""
    if isinstance(case, DecodeCase):
        return {"output": decode_battery.result(case, "triton")}
    return battery.results(case, "triton")


def compare(case: Case | DecodeCase, actual: dict[str, Tensor]) -> list[Deviation]:
    """Return the deviations of results from the definition."""
    if isinstance(case, DecodeCase):
        return decode_battery.compare(case, actual["output"])
    return battery.compare(case, actual)


def conclude(document: dict[str, Any]) -> None:
    """Name the cases that failed."""
    document["failed"] = [row["case"] for row in document["rows"] if "reason" in row]


def _shown(first: float, second: float, deviations: list[Deviation]) -> Row:
    """Return what the terminal shows: seconds, and the largest error as a share of what is allowed."""
    share = max((each.error / each.allowed for each in deviations if each.allowed), default=0.0)
    return {"first call": f"{first:.1f} s", "second": f"{second:.2f} s", "error": f"{share:.2f} of allowed"}


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def _numbers(each: Deviation) -> Row:
    numbers = {"error": each.error, "allowed": each.allowed}
    finite = {name: number if number < float("inf") else None for name, number in numbers.items()}
    return {"what": each.what, **finite, "at": list(each.at)}


def _timed(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill the memory of `torch.empty` with NaN inside a `with` block.

    An output that is not written then shows.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
