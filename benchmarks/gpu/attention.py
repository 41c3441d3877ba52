"""Compare MLR attention with PyTorch's attention on a CUDA card: `python -m benchmarks.gpu`.

As in `benchmarks.attention`, a round times all variants of a case in turn, and a variant is timed only if its result
agrees with the definition. Samples go to JSON, which `benchmarks.report` renders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine, report
from benchmarks.attention_cases import add_samples, check, option_parser, reference, selected, summary
from benchmarks.output import write_json
from benchmarks.timing import clock_of, sample
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
WIDTH = 1024  # of all heads together
TOKENS = 16384  # of all rows together; a longer sequence is one row
CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Case:
    """A row of the table: an operation on tensors of one size."""

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
        """True if the case is a point of the plot."""
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
    """Return the hierarchy of a variant; eager has that of P32.

    The ranks of P32 are doubled at rank 128.
    """
    ranks = {"8x8": (case.rank // 8,) * 8, "P32": tuple(rank * case.rank // 64 for rank in P32)}
    ranks[EAGER] = ranks["P32"]
    return Hierarchy.dyadic(ranks[variant], case.length) if variant in ranks else Hierarchy.flat(case.rank)


def tensors(case: Case, device: str) -> tuple[Tensor, ...]:
    """Return query, key, value and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(length, case.rank) for length in (case.queries, case.length, case.length, case.queries)]
    return tuple(
        torch.randn(case.batch, case.heads, *shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        for shape in shapes
    )


def attention(case: Case, variant: str) -> Callable[..., Tensor]:
    """Return attention as a function of query, key and value.

    It is causal, but for decode, which has one query.
    """
    causal = case.operation != "decode"
    if variant in SDPA:

        def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPA[variant]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return serve
    if variant == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # the compiler runs a function eagerly after a few shapes
        sizes = (None, None, case.length, case.length)
        mask = torch.compile(create_block_mask)(lambda b, h, i, j: i >= j, *sizes)
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    levels, backend = hierarchy(case, variant), "reference" if variant == EAGER else "auto"
    if causal:
        return lambda q, k, v: mlr_attention(q, k, v, levels, is_causal=True, backend=backend)
    return lambda q, k, v: mlr_decode(q, k, v, levels, key_length=case.length)


def build(case: Case, variant: str, device: str) -> Callable[[], Any]:
    """Return the call to time.

    Decode gets keys split into levels, as a cache holds them.
    """
    query, key, value, upstream = tensors(case, device)
    attend = attention(case, variant)
    if case.operation == "decode" and variant in OURS:
        parts = [part.mT.contiguous() for part in key.split(hierarchy(case, variant).ranks, -1)]
        return lambda: attend(query, parts, value)
    if case.operation != "forward + backward":
        return lambda: attend(query, key, value)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: [out := attend(*leaves), *torch.autograd.grad(out, leaves, upstream)]


def check_variant(case: Case, result: Any, variant: str, device: str) -> dict[str, Any]:
    """Check outputs and gradients of last queries against float64.

    One row is checked; see `check`.
    """
    query, key, value, upstream = (tensor[:1] for tensor in tensors(case, device))
    last = slice(-min(CHECKED_QUERIES, case.queries), None)
    trained = not isinstance(result, Tensor)

    def expected(dtype: torch.dtype) -> list[Tensor]:
        queries = query[:, :, last].to(dtype).requires_grad_(trained)
        inputs = [queries, key.to(dtype), value.to(dtype)]
        upstream_of_last = upstream[:, :, last].to(dtype) if trained else None
        return reference(hierarchy(case, variant), inputs, case.length, upstream_of_last)

    actual = [tensor[:1, :, last] for tensor in (result[:2] if trained else [result])]
    return check(actual, expected(torch.float64), expected(query.dtype), (query, key, value, upstream))


def work(case: Case, variant: str) -> int:
    """Return the FLOPs of visible pairs, by `structattn.flops`."""
    levels = hierarchy(case, variant)
    shape = {"heads": case.heads, "batch": case.batch, "is_causal": True}
    cost = flops.attention(
        levels, case.rank, case.queries, case.length, query_offset=case.length - case.queries, **shape
    )
    return cost.training if case.operation == "forward + backward" else cost.forward


def measure(case: Case, seconds: float, device: str = "cuda") -> list[dict[str, Any]]:
    """Time every variant in turn.

    A variant that fails or is wrong has the reason in its row.
    """
    rows, calls = [], {}
    for variant in case.variants:
        row = {**asdict(case), "case": str(case), "sweep": case.sweep, "variant": variant, "flops": work(case, variant)}
        rows.append(row)
        try:
            call = build(case, variant, device)
            row |= check_variant(case, call(), variant, device)
            row["peak_mb"] = machine.peak_on_card(call, device)
        except Exception as failure:  # the report says which variant cannot run here, and why
            row["reason"] = machine.reason(failure)
        if "reason" not in row:
            calls[variant] = call
    add_samples(rows, sample(calls, clock=clock_of(device), min_rounds=5, seconds=seconds))
    return rows


def main() -> None:
    options = option_parser(__doc__, out=machine.ROOT / "docs/results/attention-gpu.json", seconds=3.0).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark measures on a card alone, and nothing was written")
    result: dict[str, Any] = {**machine.facts(), **machine.card(), "rows": []}
    result["roof"] = {"bfloat16": machine.roof_on_card(torch.bfloat16)}
    for case in selected(CASES, options):
        rows = measure(case, options.seconds)
        result["rows"] += rows
        print(case, summary(rows), flush=True)
        write_json(result, options.out)  # after each case, in case a later one crashes
    result["roof_after"] = {"bfloat16": machine.roof_on_card(torch.bfloat16)}
    result["load_average_after"] = os.getloadavg()
    write_json(result, options.out)
    report.render(options.out)


if __name__ == "__main__":
    main()
