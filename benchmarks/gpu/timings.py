"""Part 2: time attention and whole models on the card, the goals first, and say which goals are met.

Kernels are compiled ahead by several processes, so that the process that measures has only to tune. The sweep over
lengths comes last, with what time is left.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import attention, models
from benchmarks.gpu.attention import DEFAULT, EAGER, FLAT, FLEX, PACKED, SDPA, WINDOWS, Case
from benchmarks.gpu.correctness import CHOICES
from benchmarks.gpu.goals import verdicts
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.workers import Job, Stage
from benchmarks.output import Row

SECONDS = 300.0
"""Time of the part on a card."""
COMPILE_SHARE = 0.35
"""Most of that time that compiling ahead may take."""
LONGEST_EAGER = 8192  # T x T scores for each level
GOAL_CASES = [
    *(
        Case(operation, 8192, rank, (*SDPA, FLEX, FLAT, *((WINDOWS,) if rank == 128 else ())))
        for rank in (64, 128)
        for operation in ("forward", "forward + backward")
    ),
    *(Case(operation, 32_768, 128, (*SDPA, FLEX, FLAT, WINDOWS)) for operation in ("forward", "forward + backward")),
    *(
        Case("decode", length, 128, (*SDPA, PACKED, FLEX, FLAT, WINDOWS), batch)
        for length in (32_768, 131_072)
        for batch in (1, 16)
    ),
]
SWEEP = [
    Case(
        operation,
        1024 * 2**power,
        rank,
        (*SDPA, FLEX, FLAT, WINDOWS, "P32", "8x8", *((EAGER,) if 1024 * 2**power <= LONGEST_EAGER else ())),
        sweep=operation == "forward" and rank == 64,
    )
    for operation in ("forward", "forward + backward")
    for rank in (64, 128)
    for power in range(7)
]
TINY_CASES = [
    Case("forward", 64, 64, (*SDPA, FLEX, FLAT), 1, sweep=True, width=64),
    Case("forward + backward", 64, 128, ("SDPA flash", WINDOWS), 1, width=128),
    Case("decode", 40, 128, (*SDPA, PACKED, FLEX, WINDOWS), 1),
]


def stages(setup: Setup, document: Row) -> list[Stage]:
    """Return what compiles ahead, then what is timed, one after the other."""
    return [Stage(compile_jobs(setup), setup.processes, COMPILE_SHARE), Stage(timed_jobs(setup))]


def compile_jobs(setup: Setup) -> list[Job]:
    """Return a job per kernel and choice of block sizes, slowest first."""
    if setup.rehearse:
        return [_compile_job(TINY_CASES[0], FLAT, 0)]
    training = Case("forward + backward", 4096, 64, (DEFAULT,))
    slow = [(training, DEFAULT), (GOAL_CASES[3], WINDOWS), (GOAL_CASES[3], FLAT), (GOAL_CASES[1], FLAT)]
    decode = [(case, variant) for case in GOAL_CASES if case.is_decode for variant in (WINDOWS, FLAT)]
    flexible = [case for case in GOAL_CASES if FLEX in case.variants]
    return [
        *(_compile_job(case, variant, blocks) for blocks in range(CHOICES) for case, variant in slow),
        *(_compile_job(case, FLEX, 0) for case in flexible),
        *(_compile_job(case, variant, 0) for case, variant in decode),
    ]


def _compile_job(case: Case, variant: str, blocks: int) -> Job:
    about = {"kind": "compile", "variant": variant, "blocks": blocks, "inputs": f"{variant}, choice {blocks}"}
    return Job(f"compile {case}, {variant}", attention.compile_ahead, (case, variant, blocks), about, 200.0)


def timed_jobs(setup: Setup) -> list[Job]:
    """Return the jobs that measure, the goals first."""
    whole_models = [
        Job("live cache", models.live_cache),
        Job("training step", models.training_steps, limit=240.0),
        Job("decoding", models.decoding, limit=240.0),
    ]
    goals, sweep = (TINY_CASES, []) if setup.rehearse else (GOAL_CASES, SWEEP)
    return [Job("roof", roof), *map(_timed_job, goals), *whole_models, *map(_timed_job, sweep)]


def _timed_job(case: Case) -> Job:
    heads = f"{case.heads} heads, {case.key_heads} key heads"
    about = {"inputs": f"{case.batch} rows, {heads}, seed 0", "variants": list(case.variants)}
    return Job(str(case), attention.measure, (case,), about)


def roof(setup: Setup) -> Any:
    """Yield the rate of PyTorch's square matrix product."""
    rate = 0.0 if setup.rehearse else machine.roof_on_card(torch.bfloat16)
    yield {"kind": "roof", "flops_per_second": rate, "shown": {"product": f"{rate / 1e12:.0f} TFLOP/s"}}


def conclude(document: dict[str, Any]) -> None:
    """Add the verdicts, and name this package's failed cases.

    Rivals may lack a kernel for this card.
    """
    document["goals"] = verdicts([] if document["rehearsal"] else document["rows"])
    rivals = attention.RIVALS
    document["failed"] = [
        f"{row['case']}, {row.get('variant', '')}".rstrip(", ")
        for row in document["rows"]
        if "reason" in row and not str(row.get("variant", "")).startswith(rivals)
    ]
