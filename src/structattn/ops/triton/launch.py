"""Launch kernels with the block sizes that tuning chose.

Triton keeps choices on disk beside compiled kernels (`TRITON_CACHE_DIR`), so that a second process need not tune. With
`TRITON_PRINT_AUTOTUNING=1` it prints each; `choices` returns them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.triton import interpreted
from structattn.ops.triton.parts import WHOLE
from structattn.ops.triton.static import RESIDENT, chunks_of

# (BLOCK_Q, BLOCK_K, warps, stages) that tuning tries, by the wider of r and dv, which sets a row's shared memory.
# Where nothing is timed, the first is taken: it spills least, see `gpu-compiled.md`.

# Triton gives each warp of chained products rows of its own, so the own side has at least 16 rows for each warp.
# Lists are short, since eight levels compile for seconds.

# Exact products of float32 go without tensor cores, and larger tiles do not fit in registers.
FLOAT32 = 32
FORWARD = {
    FLOAT32: [(64, 32, 8, 2), (32, 32, 4, 2)],
    64: [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
    128: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    256: [(64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)],
    1024: [(32, 32, 4, 1), (64, 32, 8, 2)],
}
QUERY_GRAD = {
    FLOAT32: [(64, 32, 8, 2), (32, 32, 4, 2)],
    64: [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    128: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)],
    256: [(128, 32, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)],
    1024: [(32, 32, 4, 1)],
}
KEY_GRAD = {
    FLOAT32: [(32, 32, 4, 2), (32, 64, 8, 2)],
    64: [(32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3)],
    128: [(32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)],
    256: [(32, 64, 8, 1), (32, 32, 4, 1)],
    1024: [(32, 32, 4, 1)],
}
INTERPRETED = [(64, 32, 4, 1)]
# Numbers whose divisors mean nothing to a kernel: Triton would compile it anew for multiples of 16.
UNSPECIALIZED = (
    "batch_heads", "heads", "query_length", "key_length", "query_offset", "threshold", "tuning_length",
)  # fmt: skip
# Chunk edges of r: fine ones multiply less, coarse ones make larger products of the gradients.
STEPS = {"forward": 16, "query_grad": 32, "key_grad": 32}


@dataclass(frozen=True)
class Choice:
    """Block sizes that tuning chose for one kind of call."""

    kernel: str
    key: tuple[Any, ...]
    """Arguments that tuning depends on."""
    config: str
    """Block sizes, warps and stages."""
    seconds: float
    """Time that the first call took: compiling and timing, or reading the choice of an earlier process."""


_CHOICES: list[Choice] = []


def width_class(rank: int, value_width: int, dtype: torch.dtype) -> int:
    """Return the row of the tables that serves a call."""
    wide = max(rank, value_width)
    if dtype == torch.float32:
        return FLOAT32 if wide <= 128 else 1024
    return next((width for width in FORWARD if width != FLOAT32 and wide <= width), 1024)


@functools.cache
def tuned(kernel: Any, name: str, row: int) -> Any:
    """Return the kernel, tuned over the block sizes of a table's row."""
    even = triton.heuristics({"EVEN": lambda args: is_even(args, name)})(kernel)
    key = ("tuning_length", "RANKS", "VALUES", "BY_WINDOW", "CAUSAL", "CHUNKS", "PRECISION")
    wanted = [each for each in key if each in kernel.arg_names]
    return triton.autotune(configs(name, row), wanted, do_bench=_bench, cache_results=True)(even)


def _bench(call: Callable[[], object], quantiles: tuple[float, ...]) -> Any:
    """Return a kernel's milliseconds, in less time than Triton's default takes."""
    return triton.testing.do_bench(call, warmup=10, rep=40, quantiles=quantiles)


def choices() -> list[Choice]:
    """Return what tuning chose in this process, in order."""
    return list(_CHOICES)


def configs(name: str, row: int) -> list[triton.Config]:
    """Return the block sizes of a table's row as Triton's configs."""
    table = {"forward": FORWARD, "query_grad": QUERY_GRAD, "key_grad": KEY_GRAD}[name]
    return [
        triton.Config({"BLOCK_Q": q, "BLOCK_K": k, "STEP": STEPS[name]}, num_warps=warps, num_stages=stages)
        for q, k, warps, stages in (INTERPRETED if interpreted() else table[row])
    ]


def is_even(args: dict[str, Any], name: str) -> bool:
    """Return True if only the near part needs masks: tiles are full."""
    streamed, own = ("BLOCK_Q", "BLOCK_K") if name == "key_grad" else ("BLOCK_K", "BLOCK_Q")
    tile, step = args[own], args[streamed]
    blocks = all(size % step == 0 or (size < tile and tile % size == 0) for size in args["SIZES"])
    if tile % step or not (blocks or args["BY_WINDOW"]) or args["key_start"] is not None or args["key_end"] is not None:
        return False
    stop = args["query_offset"] + args["query_length"]
    if streamed == "BLOCK_Q":
        return bool(args["query_offset"] % step == 0 and stop % step == 0)
    return bool(stop <= args["key_length"] if args["CAUSAL"] else args["key_length"] % step == 0)


def arguments(call: Call) -> dict[str, Any]:
    """Return the arguments that every attention kernel takes."""
    (batch, heads, query_length, _), (_, key_heads, key_length, _) = call.query.shape, call.key.shape
    query, key, value = (unit_stride(tensor) for tensor in (call.query, call.key, call.value))
    bias = None if call.attn_bias is None else call.attn_bias.expand(batch, heads, query_length, key_length)
    hierarchy = call.hierarchy
    return {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "key_start": call.key_start,
        "key_end": call.key_end,
        "seed": call.seed,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "bias_strides": (0, 0, 0, 0) if bias is None else bias.stride(),
        "batch_heads": batch * heads,
        "heads": heads,
        "group": heads // key_heads,
        "query_length": query_length,
        "key_length": key_length,
        "query_offset": call.query_offset,
        "scale": call.scale,
        "threshold": int(call.dropout_p * 2**32),
        "keep_scale": 1 / (1 - call.dropout_p),
        "tuning_length": 1 << max(query_length - 1, 0).bit_length(),
        "RANKS": hierarchy.ranks,
        "VALUES": call.value_widths,
        "SIZES": sizes(hierarchy),
        "BY_WINDOW": hierarchy.by_window,
        "GAINS": hierarchy.gains,
        "CAUSAL": call.is_causal,
        "PRECISION": precision(),
    }


def run(kernel: Any, name: str, call: Call, **more: Any) -> None:
    """Launch a kernel over its own side's tiles, with `more` arguments."""
    own = call.key if name == "key_grad" else call.query
    if not own.numel():
        return
    row = width_class(call.hierarchy.rank, call.value.shape[3], call.query.dtype)

    def grid(args: dict[str, Any]) -> tuple[int]:
        blocks = own.shape[0] * own.shape[1]
        if name == "key_grad":
            return (blocks * triton.cdiv(own.shape[2], args["BLOCK_K"]),)
        return (blocks * query_tiles(call, args["BLOCK_Q"]),)

    chosen = tuned(kernel, name, row)
    known, began = len(chosen.cache), time.perf_counter()
    with on_device(own):
        chosen[grid](**arguments(call), **more, enable_fp_fusion=True)
    if len(chosen.cache) > known:
        key, config = next(reversed(chosen.cache.items()))
        _CHOICES.append(Choice(kernel.__name__, key, str(config), time.perf_counter() - began))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context that makes the tensor's device current, for launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def chunk_runs(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return each launch's chunks of gradients: all, or two for wide rows."""
    count = len(chunks_of(ranks, STEPS["query_grad"]))
    most = count if sum(ranks) <= RESIDENT else 2
    return [(at, min(at + most, count)) for at in range(0, count, most)]


def sizes(hierarchy: Hierarchy) -> tuple[int, ...]:
    """Return block sizes or windows as kernels take them."""
    return tuple(min(size or WHOLE, WHOLE) for size in hierarchy.sizes)


def unit_stride(tensor: Tensor) -> Tensor:
    """Return `tensor` with a dense last axis, copied if it had none."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def precision() -> str:
    """Return the precision of float32 products that PyTorch's setting asks for."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def query_tiles(call: Call, block: int) -> int:
    """Return the most query tiles of a row, at multiples of `block`."""
    aligned = call.key_start is None and call.query_offset % block == 0
    return triton.cdiv(call.query.shape[2], block) + (0 if aligned else 1)
