"""Backward: scores are recomputed, and probabilities follow from the log-sum-exp.

One kernel holds queries and streams keys, for the gradients of queries and bias; one holds keys and streams queries,
for those of keys and values. Each result has one writer, so there are no atomics.

With `p = exp(score - lse)` and `delta = Σ out · grad_out`: a score's gradient is `p (grad_out · value - delta)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.triton import launch, static, tiles
from structattn.ops.triton.tiles import LOG2E


@triton.jit
def query_grad_kernel(
    query, key, value, bias, key_start, key_end, seed, out, lse, grad_out, delta, query_grad, bias_grad,
    query_strides, key_strides, value_strides, bias_strides, grad_out_strides,
    batch_heads, heads, group, query_length, key_length, query_offset, scale, threshold, keep_scale, tuning_length,
    RANKS: tl.constexpr, SIZES: tl.constexpr, GAINS: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of queries and bias, and `delta` for the kernel that follows; all contiguous."""
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
    upstream = tiles.load_values((grad_rows, grad_step, first, low, high), BLOCK_Q, WIDTH, True)
    result = tiles.load_values((out + row * WIDTH, WIDTH, first, low, high), BLOCK_Q, WIDTH, True)
    row_delta = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row + i, row_delta, mask=valid)
    row_lse = tl.load(lse + row + i, mask=valid, other=float("inf")) * LOG2E
    visible_end = tl.minimum(keys, first + BLOCK_Q) if CAUSAL else keys

    grads = tiles.zero_chunks(CHUNKS, BLOCK_Q, RANKS, STEP)
    for part in tl.static_range(static.part_count(RANKS, STEP)):
        for level in range(static.part_start(part, RANKS, STEP), static.part_stop(part, RANKS, STEP)):
            runs = tiles.bounds(first, level, 0, visible_end, part, BLOCK_Q, RANKS, SIZES, STEP, CAUSAL)
            for step in range(tiles.steps(runs, BLOCK_K)):
                at, stop = tiles.tile_at(step, runs, BLOCK_K)
                j = at + tl.arange(0, BLOCK_K)
                side = (key_rows, key_step, at, at, stop)
                gain = tiles.gain_of(first, at, level, part, BLOCK_Q, BLOCK_K, RANKS, SIZES, GAINS, STEP)
                score = tiles.products(
                    own, own_side, side, level, part, BLOCK_Q, BLOCK_K, RANKS, SIZES, STEP, EVEN, PRECISION
                ) * (gain * (scale * LOG2E))  # fmt: skip
                score = tiles.finish_scores(
                    score, i[:, None], j[None, :], low, high, stop, bias, shift, bias_strides, part, RANKS, STEP,
                    CAUSAL, EVEN,
                )  # fmt: skip
                probability = tl.exp2(score - row_lse[:, None])
                values = tiles.load_values(
                    (value_rows, value_step, at, at, stop), BLOCK_K, WIDTH, static.is_masked(part, RANKS, STEP, EVEN)
                )
                score_grad = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
                if seed is not None:
                    score_grad *= tiles.dropout_factor(
                        seed, pair, (i - offset)[:, None], (j + start)[None, :], threshold, keep_scale
                    )
                score_grad = probability * (score_grad - row_delta[:, None])
                if bias_grad is not None:
                    to = bias_grad + (row + i)[:, None] * key_length + (j + start)[None, :]
                    tl.store(to, score_grad, mask=valid[:, None] & (j < stop)[None, :])
                grads = tiles.add_gradients(
                    grads, score_grad * gain, first, side, level, part, CHUNKS, BLOCK_Q, BLOCK_K, RANKS, SIZES, STEP,
                    EVEN, PRECISION,
                )  # fmt: skip
    tiles.store_chunks(query_grad, row, grads, own_side, scale, CHUNKS, BLOCK_Q, RANKS, STEP)


@triton.jit
def key_grad_kernel(
    query, key, value, bias, key_start, key_end, seed, lse, grad_out, delta, key_grad, value_grad,
    query_strides, key_strides, value_strides, bias_strides, grad_out_strides,
    batch_heads, heads, group, query_length, key_length, query_offset, scale, threshold, keep_scale, tuning_length,
    RANKS: tl.constexpr, SIZES: tl.constexpr, GAINS: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of valid keys and (with the first chunk) values, contiguous; scores are (key, query)."""
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
    values = tiles.load_values((value_rows, value_step, first, 0, keys), BLOCK_K, WIDTH, True)
    seen_from = tl.maximum(low, first) if CAUSAL else low

    grads = tiles.zero_chunks(CHUNKS, BLOCK_K, RANKS, STEP)
    value_grads = tl.zeros((BLOCK_K, static.padded(WIDTH)), tl.float32)
    for member in range(group):
        head = key_head * group + member
        pair = batch * heads + head
        query_rows, query_step = tiles.rows_of(query, query_strides, batch, head, -offset)
        grad_rows, grad_step = tiles.rows_of(grad_out, grad_out_strides, batch, head, -offset)
        shift = tiles.bias_shift(bias_strides, batch, head, -offset, start)
        row = pair.to(tl.int64) * query_length - offset
        for part in tl.static_range(static.part_count(RANKS, STEP)):
            for level in range(static.part_start(part, RANKS, STEP), static.part_stop(part, RANKS, STEP)):
                runs = tiles.bounds(first, level, seen_from, high, part, BLOCK_K, RANKS, SIZES, STEP, CAUSAL)
                for step in range(tiles.steps(runs, BLOCK_Q)):
                    at, stop = tiles.tile_at(step, runs, BLOCK_Q)
                    i = at + tl.arange(0, BLOCK_Q)
                    side = (query_rows, query_step, at, at, stop)
                    gain = tiles.gain_of(first, at, level, part, BLOCK_K, BLOCK_Q, RANKS, SIZES, GAINS, STEP)
                    score = tiles.products(
                        own, own_side, side, level, part, BLOCK_K, BLOCK_Q, RANKS, SIZES, STEP, EVEN, PRECISION
                    ) * (gain * (scale * LOG2E))  # fmt: skip
                    score = tiles.finish_scores(
                        score, i[None, :], j[:, None], low, stop, keys, bias, shift, bias_strides, part, RANKS, STEP,
                        CAUSAL, EVEN,
                    )  # fmt: skip
                    row_lse = tl.load(lse + row + i, mask=i < stop, other=float("inf")) * LOG2E
                    row_delta = tl.load(delta + row + i, mask=i < stop, other=0.0)
                    probability = tl.exp2(score - row_lse[None, :])
                    upstream = tiles.load_values(
                        (grad_rows, grad_step, at, at, stop), BLOCK_Q, WIDTH, static.is_masked(part, RANKS, STEP, EVEN)
                    )
                    score_grad = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
                    kept = probability
                    if seed is not None:
                        factor = tiles.dropout_factor(
                            seed, pair, (i - offset)[None, :], (j + start)[:, None], threshold, keep_scale
                        )
                        kept = probability * factor
                        score_grad *= factor
                    if static.item(CHUNKS, 0) == 0:
                        value_grads = tl.dot(kept.to(upstream.dtype), upstream, value_grads, input_precision=PRECISION)
                    score_grad = probability * (score_grad - row_delta[None, :])
                    grads = tiles.add_gradients(
                        grads, score_grad * gain, first, side, level, part, CHUNKS, BLOCK_K, BLOCK_Q, RANKS, SIZES,
                        STEP, EVEN, PRECISION,
                    )  # fmt: skip
    row = key_pair.to(tl.int64) * key_length + start
    tiles.store_chunks(key_grad, row, grads, own_side, scale, CHUNKS, BLOCK_K, RANKS, STEP)
    if static.item(CHUNKS, 0) == 0:
        columns = tl.arange(0, static.padded(WIDTH))
        stored = (j < keys)[:, None] & (columns < WIDTH)[None, :]
        to = value_grad + (row + j)[:, None] * WIDTH + columns[None, :]
        tl.store(to, value_grads.to(value_grad.dtype.element_ty), mask=stored)


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
