"""Time attention on a card: MLR attention against PyTorch's attention and FlexAttention.

As in `benchmarks.attention`, a round times all variants of a case in turn, and a variant is timed only if its result
agrees with the definition. Decode is timed as a CUDA graph too, since a call takes less time than its launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine
from benchmarks.attention_cases import add_samples, check, reference, summary
from benchmarks.gpu.setup import Setup, choices_made, compile_times, one_choice_of_blocks
from benchmarks.output import Row
from benchmarks.timing import Call, clock_of, sample
from structattn import Hierarchy, flops, mlr_attention
from structattn.layers import MLRConfig
from structattn.ops.decode import mlr_decode

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
PACKED = "SDPA flash, heads packed"
"""The query heads of one key head as queries of one head: decode has no mask, so that the result is the same."""
FLEX, FLAT, WINDOWS, EAGER = "FlexAttention", "flat", "windows", "eager"
RIVALS = (*SDPA, PACKED, FLEX)
HIERARCHIES = {
    WINDOWS: {64: "16|16|32v@w*|1024|256", 128: "32|32|64v@w*|1024|256"},
    "P32": {64: "32|8|6|4|4|4|4|2@{T}", 128: "64|16|12|8|8|8|8|4@{T}"},
    "8x8": {64: "8x8@{T}", 128: "8x16@{T}"},
}
"""Levels by head width; `{T}` is the length of the case, from which blocks halve."""
DEFAULT = "default"
"""Plain `mlr` at the length of the case."""
WIDTH = 1024
TOKENS = 16384  # of all rows together; a longer sequence is one row
QUERY_HEADS, KEY_HEADS = 32, 8  # of decode
CHECKED_QUERIES = 64
GRAPH = ", graph"


@dataclass(frozen=True)
class Case:
    """An operation on tensors of one size."""

    operation: str  # "forward", "forward + backward" or "decode"
    length: int
    rank: int  # r = dv
    variants: tuple[str, ...]
    rows: int | None = None  # of the batch
    sweep: bool = False  # a point of the plot
    width: int = WIDTH  # of all heads together, but in decode

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", batch {self.rows}"
        return f"{self.operation}, T={self.length}, r=dv={self.rank}{rows}"

    @property
    def heads(self) -> int:
        return QUERY_HEADS if self.is_decode else self.width // self.rank

    @property
    def key_heads(self) -> int:
        return KEY_HEADS if self.is_decode else self.heads

    @property
    def batch(self) -> int:
        return self.rows or max(1, TOKENS // self.length)

    @property
    def queries(self) -> int:
        return 1 if self.is_decode else self.length

    @property
    def is_decode(self) -> bool:
        return self.operation == "decode"

    @property
    def trains(self) -> bool:
        return self.operation == "forward + backward"


def hierarchy(case: Case, variant: str) -> Hierarchy:
    """Return the hierarchy of a variant.

    That of `eager` is P32's, that of standard attention one level.
    """
    if variant == DEFAULT:
        return MLRConfig().hierarchy(case.rank, case.length)
    by_rank = HIERARCHIES.get("P32" if variant == EAGER else variant)
    return Hierarchy.flat(case.rank) if by_rank is None else Hierarchy.parse(by_rank[case.rank].format(T=case.length))


def tensors(case: Case, setup: Setup) -> list[Tensor]:
    """Return query, key, value and the gradient of the output."""
    generator = torch.Generator(setup.device).manual_seed(0)
    query, key = (case.batch, case.heads, case.queries, case.rank), (case.batch, case.key_heads, case.length, case.rank)
    return [
        torch.randn(shape, generator=generator, device=setup.device, dtype=setup.half)
        for shape in (query, key, key, query)
    ]


def attention(case: Case, variant: str, setup: Setup) -> Callable[..., Tensor]:
    """Return attention as a function of query, key and value.

    It is causal, but for decode, which has one query.
    """
    causal, grouped = not case.is_decode, case.heads != case.key_heads
    if variant == PACKED:
        packed = sdpa(SDPBackend.FLASH_ATTENTION, causal=False, grouped=False)
        shape = (case.batch, case.key_heads, case.heads // case.key_heads, case.rank)
        return lambda q, k, v: packed(q.view(shape), k, v).view(q.shape)
    if variant in SDPA:
        return sdpa(SDPA[variant], causal=causal, grouped=grouped)
    if variant == FLEX:
        return flex(case, setup)
    levels, backend = hierarchy(case, variant), "reference" if variant == EAGER else "triton"
    if causal:
        return lambda q, k, v: mlr_attention(q, k, v, levels, is_causal=True, backend=backend)
    starts = [max(levels.span(level, case.length - 1)[0], 0) for level in range(levels.levels)]
    return lambda q, keys, values: mlr_decode(
        q, keys, values, levels, key_length=case.length, level_starts=starts, enable_gqa=grouped, backend=backend
    )


def sdpa(backend: SDPBackend, *, causal: bool, grouped: bool) -> Callable[..., Tensor]:
    """Return PyTorch's attention held to one of its kernels."""

    def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return serve


def flex(case: Case, setup: Setup) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled for the case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # the compiler runs a function eagerly after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=setup.compiler)
    if case.is_decode:
        return lambda q, k, v: compiled(q, k, v, enable_gqa=case.heads != case.key_heads)
    sizes = (None, None, case.length, case.length)
    mask = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=setup.device)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def build(case: Case, variant: str, setup: Setup) -> Call:
    """Return the call to time.

    Decode gets keys and values split into levels, as a cache holds them, and no more than is live.
    """
    query, key, value, upstream = tensors(case, setup)
    attend = attention(case, variant, setup)
    if case.is_decode and variant not in RIVALS:
        keys, values = levels_of(case, variant, key, value)
        return lambda: attend(query, keys, values)
    if not case.trains:
        return lambda: attend(query, key, value)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def levels_of(case: Case, variant: str, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the live keys, dimension-major, and values of each level."""
    levels = hierarchy(case, variant)
    starts = [max(levels.span(level, case.length - 1)[0], 0) for level in range(levels.levels)]
    keys = [part[:, :, at:].mT.contiguous() for part, at in zip(key.split(levels.ranks, -1), starts, strict=True)]
    widths = levels.value_widths(case.rank)
    values = [part[:, :, at:].contiguous() for part, at in zip(value.split(widths, -1), starts, strict=True)]
    return keys, values


def check_variant(case: Case, variant: str, setup: Setup, call: Call) -> Row:
    """Check a row's output and the last queries' gradients against float64.

    The measure is that of `check`. All queries run. The gradient of the output is 0 but for those of the last, so that
    the gradients of keys and values are theirs alone.
    """
    inputs = tensors(case, setup)
    query, key, value, upstream = (tensor[:1] for tensor in inputs)
    last = slice(-min(CHECKED_QUERIES, case.queries), None)

    def expected(dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.to(dtype).requires_grad_(case.trains) for tensor in (query[:, :, last], key, value)]
        upstream_of_last = upstream[:, :, last].to(dtype) if case.trains else None
        return reference(hierarchy(case, variant), given, case.length, upstream_of_last)

    if case.trains:
        only_last = inputs[3].clone()
        only_last[:, :, : case.queries - CHECKED_QUERIES] = 0
        leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
        out = attention(case, variant, setup)(*leaves)
        grads = torch.autograd.grad(out, leaves, only_last)
        actual = [out[:1, :, last], grads[0][:1, :, last], grads[1][:1], grads[2][:1]]
    else:
        actual = [call()[:1, :, last]]
    return check(actual, expected(torch.float64), expected(query.dtype), (query, key, value, upstream))


def work(case: Case, variant: str) -> dict[str, int]:
    """Return FLOPs of visible pairs, and bytes that decode must read.

    FLOPs are those of `structattn.flops`.
    """
    levels = hierarchy(case, variant)
    shape: dict[str, Any] = {"heads": case.heads, "batch": case.batch, "is_causal": True}
    offset = case.length - case.queries
    cost = flops.attention(levels, case.rank, case.queries, case.length, query_offset=offset, **shape)
    done = {"flops": cost.training if case.trains else cost.forward}
    if case.is_decode:
        done["bytes"] = 2 * case.batch * case.key_heads * levels.cache_numbers(case.length, case.rank)
    return done


def measure(setup: Setup, case: Case) -> Iterator[Row]:
    """Time every variant in turn and yield a row for each.

    A variant that fails or is wrong has the reason in its row. First calls tune the kernels: the row says for how long.
    """
    rows, calls = [], {}
    for variant in case.variants:
        row = {
            **asdict(case),
            "kind": "attention",
            "dtype": str(setup.half).removeprefix("torch."),
            "variant": variant,
            **work(case, variant),
        }
        del row["variants"]
        rows.append(row)
        try:
            with choices_made() as choices, compile_times() as kernels:
                call = build(case, variant, setup)
                row["first_seconds"] = _seconds(call, setup)
            row |= {"choices": choices, "kernels": kernels} | check_variant(case, variant, setup, call)
            row["peak_mb"] = machine.peak_on_card(call, setup.device)
        except Exception as failure:  # the row says which variant cannot run here, and why
            row["reason"] = machine.reason(failure)
        if "reason" not in row:
            calls[variant] = call
            if case.is_decode:
                rows.append(_as_graph(row, call, setup, calls))
    clock = clock_of(setup.device)
    add_samples(rows, sample(calls, clock=clock, min_rounds=setup.least_rounds, seconds=setup.case_seconds))
    medians = summary(rows)
    for row in rows:
        yield row | ({} if "reason" in row else {"shown": {row["variant"]: medians[row["variant"]]}})


def _as_graph(row: Row, call: Call, setup: Setup, calls: dict[str, Call]) -> Row:
    """Return a call's row as a CUDA graph; add the replay to `calls`."""
    about = {name: each for name, each in row.items() if name not in ("kernels", "choices")}
    row = {**about, "variant": row["variant"] + GRAPH}
    try:
        calls[row["variant"]] = captured(call, setup)
    except Exception as failure:
        row["reason"] = machine.reason(failure)
    return row


def captured(call: Call, setup: Setup) -> Call:
    """Return the replay of a call's CUDA graph; in rehearsals the call."""
    if setup.rehearse:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compile_ahead(setup: Setup, case: Case, variant: str, blocks: int) -> Iterator[Row]:
    """Compile a variant with one choice of block sizes; return the time.

    Its kernels then lie in the cache on disk.
    """
    with one_choice_of_blocks(blocks), compile_times() as kernels:
        seconds = _seconds(build(case, variant, setup), setup)
    shown = {"compiled": f"{len(kernels)} kernels in {sum(each['seconds'] for each in kernels):.0f} s"}
    yield {"first_seconds": seconds, "kernels": kernels, "shown": shown}


def _seconds(call: Call, setup: Setup) -> float:
    def finish() -> None:
        call()
        setup.synchronize()

    return clock_of("cpu")(finish)
