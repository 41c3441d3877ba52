"""MLR attention against PyTorch's own attention on a CUDA card: `python -m benchmarks.gpu`.

As on the CPU (`benchmarks.attention`): every variant of a case is timed in turn, round by round, and only once its
result agrees with the definition; samples go to JSON, which `benchmarks.report` renders.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine, report
from structattn import Hierarchy, flops, mlr_attention
from structattn.ops.decode import mlr_decode

P32 = (32, 8, 6, 4, 4, 4, 4, 2)
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
FLEX, EAGER, OURS = "FlexAttention", "eager", ("P32", "8x8", "flat")
LENGTHS = [1024 * 2**power for power in range(7)]
LONGEST_EAGER = 8192  # T x T scores for each level
WIDTH, TOKENS = 1024, 16384  # of all heads together; in all rows together, where one sequence is shorter
CHECKED_QUERIES, LIMIT = 64, 5e-2


@dataclass(frozen=True)
class Case:
    """What is timed: one row of the table."""

    operation: str  # "forward", "forward + backward" or "decode"
    length: int
    rank: int  # r = dv
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.operation}, T={self.length}, r=dv={self.rank}"

    @property
    def heads(self) -> int:
        return WIDTH // self.rank

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.length)

    @property
    def queries(self) -> int:
        return 1 if self.operation == "decode" else self.length

    @property
    def sweep(self) -> bool:
        """Whether it is a point of the plot."""
        return self.operation == "forward" and self.rank == 64

    @property
    def variants(self) -> list[str]:
        rivals = [*SDPA] if self.operation == "decode" else [*SDPA, FLEX]
        eager = [EAGER] if self.operation != "decode" and self.length <= LONGEST_EAGER else []
        return [*rivals, *OURS, *eager]


CASES = [
    Case(operation, length, rank)
    for operation in ("forward", "forward + backward", "decode")
    for rank in (64, 128)
    for length in LENGTHS
]


def hierarchy(case: Case, variant: str) -> Hierarchy:
    """The levels of a variant: P32 is `32|8|6|4|4|4|4|2`, doubled at rank 128; the eager form is that of P32."""
    ranks = {"8x8": (case.rank // 8,) * 8, "P32": tuple(rank * case.rank // 64 for rank in P32)}
    ranks[EAGER] = ranks["P32"]
    return Hierarchy.dyadic(ranks[variant], case.length) if variant in ranks else Hierarchy.flat(case.rank)


def tensors(case: Case, device: str) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient that reaches the output."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(length, case.rank) for length in (case.queries, case.length, case.length, case.queries)]
    return tuple(
        torch.randn(case.batch, case.heads, *shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        for shape in shapes
    )


def attention(case: Case, variant: str) -> Callable[..., Tensor]:
    """Attention of three tensors: causal, or for decode of the last query."""
    causal = case.operation != "decode"
    if variant in SDPA:

        def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPA[variant]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return serve
    if variant == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # after some shapes of one function the compiler would fall back to eager code
        sizes = (None, None, case.length, case.length)
        mask = torch.compile(create_block_mask)(lambda b, h, i, j: i >= j, *sizes)
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    levels, backend = hierarchy(case, variant), "reference" if variant == EAGER else "auto"
    if causal:
        return lambda q, k, v: mlr_attention(q, k, v, levels, is_causal=True, backend=backend)
    return lambda q, k, v: mlr_decode(q, k, v, levels, key_length=case.length)


def build(case: Case, variant: str, device: str) -> Callable[[], Any]:
    """The call that is timed; a cache holds its keys level by level before."""
    query, key, value, upstream = tensors(case, device)
    attend = attention(case, variant)
    if case.operation == "decode" and variant in OURS:
        parts = [part.mT.contiguous() for part in key.split(hierarchy(case, variant).ranks, -1)]
        return lambda: attend(query, parts, value)
    if case.operation != "forward + backward":
        return lambda: attend(query, key, value)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: [out := attend(*leaves), *torch.autograd.grad(out, leaves, upstream)]


def error(case: Case, result: Any, variant: str, device: str) -> float:
    """Largest error of the last queries' outputs (and of their own gradients), one row of the batch, in float64."""
    query, key, value, upstream = (tensor[:1].double() for tensor in tensors(case, device))
    last = slice(-min(CHECKED_QUERIES, case.queries), None)
    leaf = query[:, :, last].requires_grad_()
    offset = case.length - leaf.shape[2]
    levels = hierarchy(case, variant)
    wanted = mlr_attention(leaf, key, value, levels, is_causal=True, query_offset=offset, backend="reference")
    actual = result if isinstance(result, Tensor) else result[0]
    worst = float((actual[:1, :, last] - wanted).detach().abs().max())
    if isinstance(result, Tensor):
        return worst
    (wanted_grad,) = torch.autograd.grad(wanted, leaf, upstream[:, :, last])
    return max(worst, float((result[1][:1, :, last] - wanted_grad).abs().max()))


def work(case: Case, variant: str) -> int:
    """FLOPs of the visible pairs, by the op's own formula."""
    levels = hierarchy(case, variant)
    shape = {"heads": case.heads, "batch": case.batch, "is_causal": True}
    cost = flops.attention(
        levels, case.rank, case.queries, case.length, query_offset=case.length - case.queries, **shape
    )
    return cost.training if case.operation == "forward + backward" else cost.forward


def measure(case: Case, seconds: float, device: str = "cuda") -> list[dict[str, Any]]:
    """Samples of every variant, in rounds; a variant that fails or errs has its reason instead."""
    rows, calls = [], {}
    for variant in case.variants:
        row = {**asdict(case), "case": str(case), "sweep": case.sweep, "variant": variant, "flops": work(case, variant)}
        rows.append(row)
        try:
            call = build(case, variant, device)
            row["error"] = error(case, call(), variant, device)
            row["peak_mb"] = machine.peak_on_card(call, device)
        except Exception as failure:  # the report says which variant cannot run here, and why
            row["reason"] = machine.reason(failure)
            continue
        if row["error"] <= LIMIT:
            calls[variant], row["samples_ms"] = call, []
        else:
            row["reason"] = f"wrong by {row['error']:.2g}"
    samples = {row["variant"]: row["samples_ms"] for row in rows if "samples_ms" in row}
    spent, rounds = 0.0, 0
    while calls and (rounds < 5 or (spent < seconds and rounds < 200)):
        for variant, call in calls.items():
            samples[variant].append(machine.time_on_card(call, device))
            spent += samples[variant][-1] / 1e3
        rounds += 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "docs/results/attention-gpu.json")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case's rounds")
    parser.add_argument("--longest", type=float, default=math.inf, help="leave out longer sequences")
    parser.add_argument("--only", default="", help="cases whose name has this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark measures on a card alone, and nothing was written")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**machine.facts(), **machine.card(), "rows": []}
    result["roof"] = {"bfloat16": machine.roof_on_card(torch.bfloat16)}
    for case in CASES:
        if case.length <= options.longest and options.only in str(case):
            rows = measure(case, options.seconds)
            result["rows"] += rows
            shown = {row["variant"]: report.shown(row) for row in rows}
            print(case, shown, flush=True)
            options.out.write_text(json.dumps(result, indent=1))  # What is measured is kept, whatever comes next.
    result["roof_after"] = {"bfloat16": machine.roof_on_card(torch.bfloat16)}
    result["load_average_after"] = machine.os.getloadavg()
    options.out.write_text(json.dumps(result, indent=1))
    report.render(options.out)


if __name__ == "__main__":
    main()
