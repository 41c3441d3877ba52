"""MLR attention against PyTorch's own attention on this machine: `python -m benchmarks.attention`.

Each case is timed in rounds that go through all variants in turn, so that a drift of the machine meets them alike, and
only once its result agrees with the definition in float64. Samples go to JSON; `benchmarks.report` renders it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, report
from structattn import Hierarchy, mlr_attention
from structattn.ops.decode import mlr_decode

RANKS = {"P32": (32, 8, 6, 4, 4, 4, 4, 2), "8x8": (8,) * 8, "flat": (64,)}
SDPA, FLEX, EAGER = "SDPA", "FlexAttention", "eager"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS, RANK = 8, 64
CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Case:
    """What is timed: one row of the table."""

    operation: str  # "forward", "forward + backward" or "decode"
    dtype: str
    length: int
    value_width: int = 64
    variants: tuple[str, ...] = (SDPA, "P32", "8x8", "flat")
    sweep: bool = False  # a point of the plot

    def __str__(self) -> str:
        width = "" if self.value_width == RANK else f", dv={self.value_width}"
        return f"{self.dtype} {self.operation}, T={self.length}{width}"


CASES = [
    Case("forward", "float32", 64),
    Case("forward", "float32", 1024),
    Case("forward + backward", "float32", 1024),
    Case("forward", "float32", 1024, value_width=32),
    Case("forward", "float32", 4096),
    Case("forward + backward", "float32", 4096),
    Case("forward", "bfloat16", 4096),
    Case("forward + backward", "bfloat16", 4096),
    Case("decode", "float32", 16384),
    Case("decode", "bfloat16", 16384),
]
SWEEP = [
    Case("forward", "float32", length, variants=variants, sweep=True)
    for lengths, variants in {
        (1024, 2048, 4096): (SDPA, "P32", "8x8", "flat", FLEX, EAGER),
        (8192, 16384): (SDPA, "P32", "8x8", "flat", FLEX),
        (32768, 65536): ("P32",),
    }.items()
    for length in lengths
]
Call = Callable[[], Any]


def hierarchy(variant: str, length: int) -> Hierarchy:
    """The levels of a variant; the eager form is that of P32."""
    ranks = RANKS.get(variant, RANKS["P32"])
    return Hierarchy.dyadic(ranks, length) if len(ranks) > 1 else Hierarchy.flat(*ranks)


def tensors(case: Case) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient that reaches the output."""
    generator = torch.Generator().manual_seed(0)
    queries = 1 if case.operation == "decode" else case.length
    shapes = [(queries, RANK), (case.length, RANK), (case.length, case.value_width), (queries, case.value_width)]
    return tuple(torch.randn(1, HEADS, *shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes)


def build(case: Case, variant: str) -> Call:
    """The call that is timed."""
    query, key, value, upstream = tensors(case)
    if case.operation == "decode":
        if variant == SDPA:
            return lambda: F.scaled_dot_product_attention(query, key, value)
        levels = hierarchy(variant, case.length)
        keys = [part.transpose(2, 3).contiguous() for part in key.split(levels.ranks, -1)]
        return lambda: mlr_decode(query, keys, value, levels, key_length=case.length)
    attend = attention(case, variant)
    if case.operation == "forward":
        return lambda: attend(query, key, value)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def attention(case: Case, variant: str) -> Callable[..., Tensor]:
    """Causal attention of three tensors."""
    if variant == SDPA:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if variant == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.length, case.length, device="cpu")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    levels = hierarchy(variant, case.length)
    backend = "reference" if variant == EAGER else "auto"
    return lambda q, k, v: mlr_attention(q, k, v, levels, is_causal=True, backend=backend)


def error(case: Case, variant: str) -> float:
    """Largest error of the last queries' outputs, and of the gradients that flow from them, against float64."""
    query, key, value, upstream = tensors(case)
    levels = hierarchy("flat" if variant in (SDPA, FLEX) else variant, case.length)
    last = slice(-min(CHECKED_QUERIES, query.shape[2]), None)
    exact = [tensor.double().requires_grad_() for tensor in (query[:, :, last], key, value)]
    offset = case.length - exact[0].shape[2]
    wanted = mlr_attention(*exact, levels, is_causal=True, query_offset=offset, backend="reference")
    if case.operation != "forward + backward":
        actual = build(case, variant)()[:, :, last]
        return float((actual - wanted).detach().abs().max())
    upstream = upstream.index_fill(2, torch.arange(upstream.shape[2])[: last.start], 0.0)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attention(case, variant)(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream)
    wanted_grads = torch.autograd.grad(wanted, exact, upstream[:, :, last].double())
    pairs = [(out[:, :, last], wanted), (grads[0][:, :, last], wanted_grads[0])]
    pairs += list(zip(grads[1:], wanted_grads[1:], strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def flops(case: Case, variant: str) -> int:
    """What the variant's visible pairs cost: backward takes scores again, and two products for each of forward's."""
    levels = hierarchy(variant, case.length) if variant in RANKS else Hierarchy.flat(RANK)
    queries = 1 if case.operation == "decode" else case.length
    pairs = levels.pair_counts(queries, case.length, is_causal=True, query_offset=case.length - queries)
    scores = sum(rank * count for rank, count in zip(levels.ranks, pairs, strict=True))
    score_factor, value_factor = (4, 3) if case.operation == "forward + backward" else (1, 1)
    return 2 * HEADS * (score_factor * scores + value_factor * case.value_width * pairs[0])


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Samples of every variant, in rounds; a variant that fails or errs has its reason instead."""
    rows, calls = [], {}
    limit = 1e-4 if case.dtype == "float32" else 5e-2
    for variant in case.variants:
        row: dict[str, Any] = {**asdict(case), "case": str(case), "variant": variant, "flops": flops(case, variant)}
        rows.append(row)
        try:
            row["error"] = error(case, variant)
        except Exception as failure:  # the report says which variant cannot run here, and why
            row["reason"] = machine.reason(failure)
            continue
        if not row["error"] <= limit:
            row["reason"] = f"wrong by {row['error']:.2g}"
            continue
        calls[variant] = build(case, variant)
        if case.operation != "forward":  # forward has just been run to be checked
            calls[variant]()
        row["samples_ms"] = []
    samples = {row["variant"]: row["samples_ms"] for row in rows if "samples_ms" in row}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - start < seconds and rounds < 200):
        for variant, call in calls.items():
            before = time.perf_counter()
            call()
            samples[variant].append((time.perf_counter() - before) * 1e3)
        rounds += 1
        if case.sweep and time.perf_counter() - start > 5 * seconds:
            break
    return rows


def peak_memory(case: Case, variant: str) -> float:
    """MB that one call takes beyond its inputs, in a process of its own."""
    code = f"from benchmarks.attention import *; print_peak({case!r}, {variant!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(case: Case, variant: str) -> None:
    """The child of `peak_memory`."""
    warm = Case(case.operation, case.dtype, 256, variants=case.variants)
    build(warm, variant)()
    call = build(case, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the highest residence starts anew
    before = _residence("VmHWM")
    call()
    print(_residence("VmHWM") - before)


def _residence(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "docs/results/attention-cpu.json")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case's rounds")
    parser.add_argument("--longest", type=float, default=math.inf, help="leave out longer sequences")
    parser.add_argument("--only", default="", help="cases whose name has this")
    options = parser.parse_args()
    result: dict[str, Any] = {**machine.facts(), "roof": {name: machine.roof(dtype) for name, dtype in DTYPES.items()}}
    result["rows"] = []
    for case in [*CASES, *SWEEP]:
        if case.length > options.longest or options.only not in str(case):
            continue
        rows = measure(case, options.seconds)
        for row in rows:
            if case.sweep and "samples_ms" in row and row["variant"] != FLEX:
                row["peak_mb"] = peak_memory(case, row["variant"])
        result["rows"] += rows
        print(case, {row["variant"]: _summary(row) for row in rows}, flush=True)
    result["roof_after"] = {name: machine.roof(dtype) for name, dtype in DTYPES.items()}
    result["load_average_after"] = machine.os.getloadavg()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    report.render(options.out)


def _summary(row: dict[str, Any]) -> str:
    return f"{machine.median(row['samples_ms']):.2f} ms" if "samples_ms" in row else row["reason"]


if __name__ == "__main__":
    machine.pin_threads("benchmarks.attention")
    main()
