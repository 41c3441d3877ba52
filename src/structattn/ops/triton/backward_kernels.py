"""Compute gradients from recomputed scores and the log-sum-exp.

One kernel holds queries and streams keys, for the gradients of queries and bias. The other holds keys and streams
queries, for those of keys and values. Each result has one writer, so there are no atomics.

With `p = exp(score - lse)` and `delta = Σ out · grad_out`: a score's gradient is `p (grad_out · value - delta)`.
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
def query_grad_kernel(
    query, key, value, bias, key_start, key_end, seed, out, lse, grad_out, delta, query_grad, bias_grad,
    query_strides, key_strides, value_strides, bias_strides, grad_out_strides,
    batch_heads, heads, group, query_length, key_length, query_offset, scale, threshold, keep_scale, tuning_length,
    RANKS: tl.constexpr, VALUES: tl.constexpr, SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, GAINS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write contiguous gradients of queries and bias, and the rows' `delta`."""
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
    grad_rows, grad_step = tiles.rows_of(grad_out, grad_out_strides, batch, head, -offset)
    shift = tiles.bias_shift(bias_strides, batch, head, -offset, start)
    i = first + tl.arange(0, BLOCK_Q)
    valid = (i >= low) & (i < high)
    row = pair.to(tl.int64) * query_length - offset
    own_side = (query_rows, query_step, first, low, high)
    own = tiles.load_own(own_side, BLOCK_Q, RANKS, STEP)
    row_delta = tl.zeros((BLOCK_Q,), tl.float32)
    grad_side = (grad_rows, grad_step, first, low, high)
    upstream = tiles.load_own(grad_side, BLOCK_Q, VALUES, VALUE_STEP)
    out_rows = (out + row * static.prefix(VALUES, len(VALUES)), static.prefix(VALUES, len(VALUES)), first, low, high)
    for c in tl.static_range(static.chunk_count(VALUES, VALUE_STEP)):
        result = tiles.load_chunk(out_rows, BLOCK_Q, c, VALUES, VALUE_STEP, True)
        row_delta += tl.sum(upstream[c].to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row + i, row_delta, mask=valid)
    row_lse = tl.load(lse + row + i, mask=valid, other=float("inf")) * LOG2E
    visible_end = tl.minimum(keys, first + BLOCK_Q) if CAUSAL else keys

    grads = tiles.zero_chunks(CHUNKS, BLOCK_Q, RANKS, STEP)
    for part in tl.static_range(parts.part_count(PARTS)):
        for level in range(parts.field(PARTS, part, "first"), parts.field(PARTS, part, "stop")):
            runs = tiles.bounds(first, level, 0, visible_end, PARTS, part, BLOCK_Q, SIZES, BY_WINDOW, CAUSAL)
            for step in range(tiles.steps(runs, BLOCK_K)):
                at, stop = tiles.tile_at(step, runs, BLOCK_K)
                j = at + tl.arange(0, BLOCK_K)
                side = (key_rows, key_step, at, at, stop)
                gain = tiles.gain_of(first, at, level, PARTS, part, BLOCK_Q, BLOCK_K, SIZES, BY_WINDOW, GAINS)
                score = tiles.products(
                    own, own_side, side, level, PARTS, part, BLOCK_Q, BLOCK_K, RANKS, SIZES, BY_WINDOW, STEP,
                    PRECISION,
                ) * (gain * (scale * LOG2E))  # fmt: skip
                score = tiles.finish_scores(
                    score, i[:, None], j[None, :], low, high, stop, bias, shift, bias_strides, PARTS, part, SIZES,
                    CAUSAL,
                )  # fmt: skip
                probability = tl.exp2(score - row_lse[:, None])
                score_grad = tiles.products(
                    upstream, grad_side, (value_rows, value_step, at, at, stop), level, PARTS, part, BLOCK_Q, BLOCK_K,
                    VALUES, SIZES, BY_WINDOW, VALUE_STEP, PRECISION,
                )  # fmt: skip
                if seed is not None:
                    score_grad *= tiles.dropout_factor(
                        seed, pair, (i - offset)[:, None], (j + start)[None, :], threshold, keep_scale
                    )
                score_grad = probability * (score_grad - row_delta[:, None])
                if bias_grad is not None:
                    to = bias_grad + (row + i)[:, None] * key_length + (j + start)[None, :]
                    tl.store(to, score_grad, mask=valid[:, None] & (j < stop)[None, :])
                grads = tiles.add_mixed(
                    grads, score_grad * gain, first, side, level, PARTS, part, CHUNKS, BLOCK_Q, BLOCK_K, RANKS, SIZES,
                    BY_WINDOW, STEP, PRECISION,
                )  # fmt: skip
    tiles.store_chunks(query_grad, row, grads, own_side, scale, CHUNKS, BLOCK_Q, RANKS, STEP)


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def key_grad_kernel(
    query, key, value, bias, key_start, key_end, seed, lse, grad_out, delta, key_grad, value_grad,
    query_strides, key_strides, value_strides, bias_strides, grad_out_strides,
    batch_heads, heads, group, query_length, key_length, query_offset, scale, threshold, keep_scale, tuning_length,
    RANKS: tl.constexpr, VALUES: tl.constexpr, SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, GAINS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of valid keys and values, contiguous.

    Those of values are written with the first chunk only. Scores are (key, query).
    """
    PARTS: tl.constexpr = parts.parts_of(RANKS, VALUES, SIZES, BY_WINDOW, CAUSAL, BLOCK_K, BLOCK_Q, STEP, EVEN)
    VALUE_STEP: tl.constexpr = static.value_step(VALUES, STEP)
    key_tiles = tl.num_programs(0) // (batch_heads // group)
    key_pair, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    batch, key_head = key_pair // (heads // group), key_pair % (heads // group)
    start, keys, offset = tiles.row_of(key_start, key_end, batch, key_length, query_offset)
    low, high = tl.maximum(offset, 0), offset + query_length
    first = tile * BLOCK_K
    if first >= keys:
        return

    key_rows, key_step = tiles.rows_of(key, key_strides, batch, key_head, start)
    value_rows, value_step = tiles.rows_of(value, value_strides, batch, key_head, start)
    j = first + tl.arange(0, BLOCK_K)
    own_side = (key_rows, key_step, first, 0, keys)
    own = tiles.load_own(own_side, BLOCK_K, RANKS, STEP)
    value_side = (value_rows, value_step, first, 0, keys)
    values = tiles.load_own(value_side, BLOCK_K, VALUES, VALUE_STEP)
    seen_from = tl.maximum(low, first) if CAUSAL else low

    grads = tiles.zero_chunks(CHUNKS, BLOCK_K, RANKS, STEP)
    value_grads = tiles.zero_chunks(static.all_chunks(VALUES, VALUE_STEP), BLOCK_K, VALUES, VALUE_STEP)
    for member in range(group):
        head = key_head * group + member
        pair = batch * heads + head
        query_rows, query_step = tiles.rows_of(query, query_strides, batch, head, -offset)
        grad_rows, grad_step = tiles.rows_of(grad_out, grad_out_strides, batch, head, -offset)
        shift = tiles.bias_shift(bias_strides, batch, head, -offset, start)
        row = pair.to(tl.int64) * query_length - offset
        for part in tl.static_range(parts.part_count(PARTS)):
            for level in range(parts.field(PARTS, part, "first"), parts.field(PARTS, part, "stop")):
                runs = tiles.bounds(first, level, seen_from, high, PARTS, part, BLOCK_K, SIZES, BY_WINDOW, CAUSAL)
                for step in range(tiles.steps(runs, BLOCK_Q)):
                    at, stop = tiles.tile_at(step, runs, BLOCK_Q)
                    i = at + tl.arange(0, BLOCK_Q)
                    side = (query_rows, query_step, at, at, stop)
                    gain = tiles.gain_of(first, at, level, PARTS, part, BLOCK_K, BLOCK_Q, SIZES, BY_WINDOW, GAINS)
                    score = tiles.products(
                        own, own_side, side, level, PARTS, part, BLOCK_K, BLOCK_Q, RANKS, SIZES, BY_WINDOW, STEP,
                        PRECISION,
                    ) * (gain * (scale * LOG2E))  # fmt: skip
                    score = tiles.finish_scores(
                        score, i[None, :], j[:, None], low, stop, keys, bias, shift, bias_strides, PARTS, part, SIZES,
                        CAUSAL,
                    )  # fmt: skip
                    row_lse = (
                        tiles.load_rows(lse + row, i, stop, float("inf"), parts.field(PARTS, part, "masked")) * LOG2E
                    )
                    row_delta = tiles.load_rows(delta + row, i, stop, 0.0, parts.field(PARTS, part, "masked"))
                    probability = tl.exp2(score - row_lse[None, :])
                    grad_side = (grad_rows, grad_step, at, at, stop)
                    score_grad = tiles.products(
                        values, value_side, grad_side, level, PARTS, part, BLOCK_K, BLOCK_Q, VALUES, SIZES, BY_WINDOW,
                        VALUE_STEP, PRECISION,
                    )  # fmt: skip
                    kept = probability
                    if seed is not None:
                        factor = tiles.dropout_factor(
                            seed, pair, (i - offset)[None, :], (j + start)[:, None], threshold, keep_scale
                        )
                        kept = probability * factor
                        score_grad *= factor
                    if static.item(CHUNKS, 0) == 0:
                        value_grads = tiles.add_mixed(
                            value_grads, kept, first, grad_side, level, PARTS, part,
                            static.all_chunks(VALUES, VALUE_STEP), BLOCK_K, BLOCK_Q, VALUES, SIZES, BY_WINDOW,
                            VALUE_STEP, PRECISION,
                        )  # fmt: skip
                    score_grad = probability * (score_grad - row_delta[None, :])
                    grads = tiles.add_mixed(
                        grads, score_grad * gain, first, side, level, PARTS, part, CHUNKS, BLOCK_K, BLOCK_Q, RANKS,
                        SIZES, BY_WINDOW, STEP, PRECISION,
                    )  # fmt: skip
    row = key_pair.to(tl.int64) * key_length + start
    tiles.store_chunks(key_grad, row, grads, own_side, scale, CHUNKS, BLOCK_K, RANKS, STEP)
    if static.item(CHUNKS, 0) == 0:
        tiles.store_chunks(
            value_grad, row, value_grads, value_side, 1.0, static.all_chunks(VALUES, VALUE_STEP), BLOCK_K, VALUES,
            VALUE_STEP,
        )  # fmt: skip


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients, see `Backend`.

    The gradient of a bias is written for each pair of tokens, `(B, Hq, Tq, Tk)`, and then summed to its shape.
    """
    # Kernels write only the valid range of each row; padding has gradient 0.
    padded = call.key_start is not None or call.key_end is not None
    make = torch.zeros if padded else torch.empty
    query, key, value = (make(x.shape, dtype=x.dtype, device=x.device) for x in (call.query, call.key, call.value))
    grad_out, out, lse = launch.unit_stride(grad_out), out.contiguous(), lse.contiguous()
    delta, pair_grad, bias = torch.empty_like(lse), None, None
    if needs_bias_grad and call.attn_bias is not None:
        pair_grad = lse.new_zeros(*lse.shape, call.key.shape[2])
    shared = {"lse": lse, "grad_out": grad_out, "delta": delta, "grad_out_strides": grad_out.stride()}
    for chunks in launch.chunk_runs(call.hierarchy.ranks):
        grads = {"out": out, "query_grad": query, "bias_grad": pair_grad, "CHUNKS": chunks}
        launch.run(query_grad_kernel, "query_grad", call, **shared, **grads)
    for chunks in launch.chunk_runs(call.hierarchy.ranks):
        launch.run(key_grad_kernel, "key_grad", call, **shared, key_grad=key, value_grad=value, CHUNKS=chunks)
    if pair_grad is not None and call.attn_bias is not None:
        bias = pair_grad.sum_to_size(call.attn_bias.shape).to(call.attn_bias.dtype)
    return query, key, value, bias
