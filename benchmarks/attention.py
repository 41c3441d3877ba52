"""Compare MLR attention with PyTorch's attention on this machine: `python -m benchmarks.attention`.

A round times all variants of a case in turn, so that a drift of the machine affects them alike. A variant is timed only
if its result agrees with the definition in float64. Samples go to JSON, with the machine's own roofs;
`python -m benchmarks.report FILE.json` renders them. `--instructions avx2` measures what an older processor would run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import structattn.flops
from benchmarks import cpu_page, machine, report, roofs
from benchmarks.attention_cases import add_samples, check, option_parser, reference, selected, summary
from benchmarks.output import write_json
from benchmarks.timing import Call, sample
from structattn import Hierarchy, mlr_attention
from structattn.layers import MLRConfig
from structattn.ops.decode import mlr_decode

# `{T}` is the length of the case: blocks halve from it.
HIERARCHIES = {
    "P32": "32|8|6|4|4|4|4|2@{T}",
    "8x8": "8x8@{T}",
    "windows": "16|16|32v@w512|128",
    "flat": "64",
}
SDPA, FLEX, EAGER = "SDPA", "FlexAttention", "eager"
DEFAULT = "default"
"""Plain `mlr` at the length of the case."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS, RANK = 8, 64
CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Case:
    """A row of the table: an operation on tensors of one size."""

    operation: str  # "forward", "forward + backward" or "decode"
    dtype: str
    length: int
    value_width: int = 64
    variants: tuple[str, ...] = (SDPA, "P32", "8x8", "windows", DEFAULT, "flat")
    sweep: bool = False  # a point of the plot

    def __str__(self) -> str:
        width = "" if self.value_width == RANK else f", dv={self.value_width}"
        return f"{self.dtype} {self.operation}, T={self.length}{width}"


CASES = [
    Case("forward", "float32", 64),
    Case("forward + backward", "float32", 64),
    Case("forward", "float32", 1024),
    Case("forward + backward", "float32", 1024),
    Case("forward", "float32", 1024, value_width=32, variants=(SDPA, "P32", "8x8", "flat")),
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
        (1024, 2048, 4096): (SDPA, "P32", "8x8", "windows", DEFAULT, "flat", FLEX, EAGER),
        (8192, 16384): (SDPA, "P32", "8x8", "windows", DEFAULT, "flat", FLEX),
        (32768, 65536): ("P32",),
    }.items()
    for length in lengths
]


def hierarchy(variant: str, length: int) -> Hierarchy:
    """Return the hierarchy of a variant; eager has that of P32."""
    if variant == DEFAULT:
        return MLRConfig().hierarchy(RANK, length)
    return Hierarchy.parse(HIERARCHIES.get(variant, HIERARCHIES["P32"]).format(T=length))


def tensors(case: Case) -> tuple[Tensor, ...]:
    """Return query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries = 1 if case.operation == "decode" else case.length
    shapes = [(queries, RANK), (case.length, RANK), (case.length, case.value_width), (queries, case.value_width)]
    return tuple(torch.randn(1, HEADS, *shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes)


def build(case: Case, variant: str) -> Call:
    """Return the call to time."""
    query, key, value, upstream = tensors(case)
    if case.operation == "decode":
        if variant == SDPA:
            return lambda: F.scaled_dot_product_attention(query, key, value)
        levels = hierarchy(variant, case.length)
        keys = [part.transpose(2, 3).contiguous() for part in key.split(levels.ranks, -1)]
        widths = levels.value_widths(case.value_width)
        values = [part.contiguous() for part in value.split(widths, -1)]
        return lambda: mlr_decode(query, keys, values, levels, key_length=case.length)
    attend = attention(case, variant)
    if case.operation == "forward":
        return lambda: attend(query, key, value)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def attention(case: Case, variant: str) -> Callable[..., Tensor]:
    """Return causal attention as a function of query, key and value."""
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


def check_variant(case: Case, variant: str) -> dict[str, Any]:
    """Check outputs and gradients of the last queries against float64.

    See `check`.
    """
    query, key, value, upstream = tensors(case)
    levels = hierarchy("flat" if variant in (SDPA, FLEX) else variant, case.length)
    last = slice(-min(CHECKED_QUERIES, query.shape[2]), None)
    trained = case.operation == "forward + backward"

    def expected(dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_(trained) for tensor in (query[:, :, last], key, value)]
        return reference(levels, inputs, case.length, upstream[:, :, last].to(dtype) if trained else None)

    if trained:
        only_last = upstream.index_fill(2, torch.arange(upstream.shape[2])[: last.start], 0.0)
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out = attention(case, variant)(*leaves)
        grads = torch.autograd.grad(out, leaves, only_last)
        actual = [out[:, :, last], grads[0][:, :, last], *grads[1:]]
    else:
        actual = [build(case, variant)()[:, :, last]]
    return check(actual, expected(torch.float64), expected(query.dtype), (query, key, value, upstream))


def flops(case: Case, variant: str) -> int:
    """Return the FLOPs of visible pairs.

    Backward recomputes the scores, and has two products for each product of forward.
    """
    levels = Hierarchy.flat(RANK) if variant in (SDPA, FLEX) else hierarchy(variant, case.length)
    queries = 1 if case.operation == "decode" else case.length
    cost = structattn.flops.attention(
        levels, case.value_width, queries, case.length, heads=HEADS, is_causal=True, query_offset=case.length - queries
    )
    return cost.training if case.operation == "forward + backward" else cost.forward


def decode_bytes(case: Case, variant: str) -> int:
    """Return the bytes of keys and values that one decoding step reads.

    Its query sees them.
    """
    levels = Hierarchy.flat(RANK) if variant == SDPA else hierarchy(variant, case.length)
    return HEADS * levels.cache_numbers(case.length, case.value_width) * DTYPES[case.dtype].itemsize


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Time every variant in turn.

    A variant that fails or is wrong has the reason in its row.
    """
    rows, calls = [], {}
    for variant in case.variants:
        row: dict[str, Any] = {**asdict(case), "case": str(case), "variant": variant, "flops": flops(case, variant)}
        rows.append(row)
        if case.operation == "decode":
            row["bytes"] = decode_bytes(case, variant)
            row["read_rate"] = roofs.read_rate(row["bytes"])
        try:
            row |= check_variant(case, variant)
        except Exception as failure:  # the report says which variant cannot run here, and why
            row["reason"] = machine.reason(failure)
        if "reason" in row:
            continue
        calls[variant] = build(case, variant)
        if case.operation != "forward":  # the check has warmed up forward
            calls[variant]()
    limit = 5 * seconds if case.sweep else math.inf
    add_samples(rows, sample(calls, min_rounds=3, seconds=seconds, time_limit=limit))
    return rows


def peak_memory(case: Case, variant: str) -> float:
    """Measure the MB that a call needs beyond its inputs.

    The call runs in a process of its own.
    """
    code = f"from benchmarks.attention import *; print_peak({case!r}, {variant!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(case: Case, variant: str) -> None:
    """Print the peak of one call in MB.

    `peak_memory` runs this in a child process.
    """
    warm = Case(case.operation, case.dtype, 256, variants=case.variants)
    build(warm, variant)()
    call = build(case, variant)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size, VmHWM
    before = _residence("VmHWM")
    call()
    print(_residence("VmHWM") - before)


def _residence(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def main() -> None:
    parser = option_parser(__doc__, out=machine.ROOT / "docs/results/attention-cpu.json", seconds=6.0)
    parser.add_argument("--instructions", choices=machine.INSTRUCTIONS, default="native", help="most that may be used")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the sweep over lengths and its plot")
    options = parser.parse_args()
    if not options.out.name.startswith(cpu_page.PAGE):
        parser.error(f"--out: the page takes files whose names start with {cpu_page.PAGE}, got {options.out.name}")
    machine.pin_threads("benchmarks.attention", options.instructions)
    console = Console()
    before = roofs.measure()
    result: dict[str, Any] = {**machine.facts(), "roofs": before, "rows": []}
    cpu_page.print_roofs(result, console)
    for case in selected(CASES if options.no_sweep else [*CASES, *SWEEP], options):
        rows = measure(case, options.seconds)
        for row in rows:
            if case.sweep and "samples_ms" in row and row["variant"] != FLEX:
                row["peak_mb"] = peak_memory(case, row["variant"])
        result["rows"] += rows
        print(case, summary(rows), flush=True)
    result["roofs"] = roofs.higher(before, roofs.measure())
    result["load_average_after"] = os.getloadavg()
    write_json(result, options.out)
    report.render(options.out)
    cpu_page.print_roofs(result, console)
    cpu_page.print_cases(result, console)


if __name__ == "__main__":
    main()
