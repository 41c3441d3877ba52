"""Compute attention: hold a tile of queries and stream keys and values past it.

Softmax is taken online.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.triton import launch, parts, static, tiles
from structattn.ops.triton.tiles import LOG2E


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def forward_kernel(
    query, key, value, bias, key_start, key_end, seed, out, lse,
    query_strides, key_strides, value_strides, bias_strides,
    batch_heads, heads, group, query_length, key_length, query_offset, scale, threshold, keep_scale, tuning_length,
    RANKS: tl.constexpr, VALUES: tl.constexpr, SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, GAINS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp, contiguous.

    Queries in left padding, at negative positions, are not written.
    """
    PARTS: tl.constexpr = parts.parts_of(RANKS, VALUES, SIZES, BY_WINDOW, CAUSAL, BLOCK_Q, BLOCK_K, STEP, EVEN)
    VALUE_STEP: tl.constexpr = static.value_step(VALUES, STEP)
    pair, batch, head, start, keys, offset, low, high, first = tiles.query_tile(
        key_start, key_end, batch_heads, heads, query_length, key_length, query_offset, BLOCK_Q, CAUSAL
    )
    if first >= high:
        return

    query_rows, query_step = tiles.rows_of(query, query_strides, batch, head, -offset)
    key_rows, key_step = tiles.rows_of(key, key_strides, batch, head // group, start)
    value_rows, value_step = tiles.rows_of(value, value_strides, batch, head // group, start)
    shift = tiles.bias_shift(bias_strides, batch, head, -offset, start)
    i = first + tl.arange(0, BLOCK_Q)
    own_side = (query_rows, query_step, first, low, high)
    own = tiles.load_own(own_side, BLOCK_Q, RANKS, STEP)
    visible_end = tl.minimum(keys, first + BLOCK_Q) if CAUSAL else keys

    mixed = tiles.zero_chunks(static.all_chunks(VALUES, VALUE_STEP), BLOCK_Q, VALUES, VALUE_STEP)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for part in tl.static_range(parts.part_count(PARTS)):
        for level in range(parts.field(PARTS, part, "first"), parts.field(PARTS, part, "stop")):
            runs = tiles.bounds(first, level, 0, visible_end, PARTS, part, BLOCK_Q, SIZES, BY_WINDOW, CAUSAL)
            for step in range(tiles.steps(runs, BLOCK_K)):
                at, stop = tiles.tile_at(step, runs, BLOCK_K)
                j = at + tl.arange(0, BLOCK_K)
                side = (key_rows, key_step, at, at, stop)
                gain = tiles.gain_of(first, at, level, PARTS, part, BLOCK_Q, BLOCK_K, SIZES, BY_WINDOW, GAINS)
                score = tiles.products(
                    own, own_side, side, level, PARTS, part, BLOCK_Q, BLOCK_K, RANKS, SIZES, BY_WINDOW, STEP, PRECISION
                ) * (gain * (scale * LOG2E))  # fmt: skip
                score = tiles.finish_scores(
                    score, i[:, None], j[None, :], low, high, stop, bias, shift, bias_strides, PARTS, part, SIZES,
                    CAUSAL,
                )  # fmt: skip
                new_top = tl.maximum(top, tl.max(score, 1))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without visible keys so far
                probability = tl.exp2(score - base[:, None])
                decay = tl.exp2(top - base)
                total = total * decay + tl.sum(probability, 1)
                if seed is not None:
                    probability *= tiles.dropout_factor(
                        seed, pair, (i - offset)[:, None], (j + start)[None, :], threshold, keep_scale
                    )
                mixed = tiles.decay_chunks(mixed, decay, PARTS, part, VALUES, VALUE_STEP)
                mixed = tiles.add_mixed(
                    mixed, probability, first, (value_rows, value_step, at, at, stop), level, PARTS, part,
                    static.all_chunks(VALUES, VALUE_STEP), BLOCK_Q, BLOCK_K, VALUES, SIZES, BY_WINDOW, VALUE_STEP,
                    PRECISION,
                )  # fmt: skip
                top = new_top

    empty = total == 0.0
    log_sum = tl.where(empty, float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    row = pair.to(tl.int64) * query_length - offset
    norm = tl.where(empty, 1.0, total)[:, None]
    tiles.store_chunks(
        out, row, tiles.divided(mixed, norm), own_side, 1.0, static.all_chunks(VALUES, VALUE_STEP), BLOCK_Q, VALUES,
        VALUE_STEP,
    )  # fmt: skip
    tl.store(lse + row + i, log_sum, mask=(i >= low) & (i < high))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`."""
    shape, width = call.query.shape[:3], call.value.shape[3]
    if call.key_start is None:
        out, lse = call.query.new_empty(*shape, width), call.query.new_empty(shape, dtype=torch.float32)
    else:  # the kernel skips queries before the first valid key
        out, lse = call.query.new_zeros(*shape, width), call.query.new_full(shape, torch.inf, dtype=torch.float32)
    launch.run(forward_kernel, "forward", call, out=out, lse=lse)
    return out, lse
