"""Functions of the decode kernel: runs at one depth, loads, online softmax.

A *piece* is a level of keys, or a part of a wide one. `RANKS` and `SIZES` belong to pieces, `VALUES` and `VALUE_SIZES`
to the levels that own value dimensions. A *row* of a buffer is a pair (pointer to index 0 of a head, stride).

Where `ALIGNED`, index 0 of each buffer and its strides are multiples of 16 bytes. The compiler then loads vectors, and
copies them to shared memory ahead of time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from structattn.ops.triton import parts, static, tiles
from structattn.ops.triton.tiles import reached

WHOLE = tl.constexpr(parts.WHOLE)

# --- where tiles lie --------------------------------------------------------------------------------------------------


@triton.jit
def first_reached(position, SIZE: tl.constexpr, BY_WINDOW: tl.constexpr):
    """Return the first position that a level reaches from `position`."""
    if BY_WINDOW:
        return tl.maximum(position - (SIZE - 1), 0)
    else:
        return position // SIZE * SIZE


@triton.jit
def run_of(
    earliest, latest, start, low, high, PIECE: tl.constexpr, COUNT: tl.constexpr, SIZES: tl.constexpr,
    BY_WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the first tile of a piece's run and its stop.

    The run lies within the tiles `low … high` and holds a multiple of `COUNT` keys; it may be empty. Every query, at
    positions `earliest … latest`, shares all levels up to `PIECE` with its keys, and no other.
    """
    first = start + first_reached(latest, SIZES[PIECE], BY_WINDOW)
    stop = start + earliest + 1
    if len(SIZES) > PIECE + 1:
        stop = start + first_reached(earliest, SIZES[PIECE + 1], BY_WINDOW)
    first = tl.minimum(tl.maximum((first + BLOCK_K - 1) // BLOCK_K, low), high)
    stop = tl.minimum(stop // BLOCK_K, high)
    count = tl.where(earliest >= 0, tl.maximum(stop - first, 0), 0) // (COUNT // BLOCK_K) * (COUNT // BLOCK_K)
    return first, first + count


@triton.jit
def skip_runs(tile, runs):
    """Return tile number `tile` of those that lie outside all runs."""
    for at in tl.static_range(len(runs)):
        first, stop = runs[at]
        tile += tl.where(tile >= first, stop - first, 0)
    return tile


# --- loads ------------------------------------------------------------------------------------------------------------


@triton.jit
def keys_of(levels, strides, starts, batch, head, PIECE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to a head's key 0, and the dimensions' stride."""
    rows = levels[PIECE] + batch.to(tl.int64) * strides[3 * PIECE] + head.to(tl.int64) * strides[3 * PIECE + 1]
    return aligned(rows - starts[PIECE], tl.cast(strides[3 * PIECE + 2], tl.int64), ALIGNED)


@triton.jit
def values_of(levels, strides, starts, batch, head, PIECE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to a head's value 0, and the rows' stride."""
    step = tl.cast(strides[3 * PIECE + 2], tl.int64)
    rows = levels[PIECE] + batch.to(tl.int64) * strides[3 * PIECE] + head.to(tl.int64) * strides[3 * PIECE + 1]
    return aligned(rows - starts[PIECE] * step, step, ALIGNED)


@triton.jit
def aligned(rows, stride, ALIGNED: tl.constexpr):
    """Return pointer and stride, declared as multiples of 16 bytes where ALIGNED."""
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
        stride = tl.multiple_of(stride, 16 * 8 // rows.dtype.element_ty.primitive_bitwidth)
    return rows, stride


@triton.jit
def load_keys(
    rows, first, low, high, RANK: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return a piece's keys at `COUNT` indices, `(r_l padded, COUNT)`.

    The indices count from `first`. Where MASKED, keys outside `low … high` are zeros, or anything within the 16 bytes
    that hold an edge.
    """
    at, stride = rows
    if ALIGNED:  # one condition for each vector
        vector: tl.constexpr = 16 * 8 // at.dtype.element_ty.primitive_bitwidth
        low, high = low // vector * vector, (high + vector - 1) // vector * vector
    dims, j = tl.arange(0, static.padded(RANK)), first + tl.arange(0, COUNT)
    at += dims[:, None].to(tl.int64) * stride + j[None, :]
    inside = (dims < RANK)[:, None]
    if MASKED:
        inside = inside & ((j >= low) & (j < high))[None, :]
    if MASKED or static.padded(RANK) > RANK:
        return tl.load(at, mask=inside, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_queries(rows, valid, PIECE: tl.constexpr, RANKS: tl.constexpr):
    """Return a piece's dimensions of the queries, `(ROWS, r_l padded)`."""
    rank: tl.constexpr = static.item(RANKS, PIECE)
    dims = tl.arange(0, static.padded(rank))
    inside = valid[:, None] & (dims < rank)[None, :]
    return tl.load(rows[:, None] + static.prefix(RANKS, PIECE) + dims[None, :], mask=inside, other=0.0)


@triton.jit
def queries_of(own, rows, valid, PIECE: tl.constexpr, RANKS: tl.constexpr):
    """Return a piece's dimensions of the queries, held or loaded."""
    if static.is_resident(RANKS):
        return own[PIECE]
    else:
        return load_queries(rows, valid, PIECE, RANKS)


# --- a tile -----------------------------------------------------------------------------------------------------------


@triton.jit
def run_score(
    own, query_rows, valid, key_rows, first, PIECE: tl.constexpr, COUNT: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return products `(ROWS, COUNT)` summed over pieces up to `PIECE`, without mask."""
    score = tl.zeros((ROWS, COUNT), tl.float32)
    for piece in tl.static_range(PIECE + 1):
        keys = load_keys(key_rows[piece], first, 0, 0, static.item(RANKS, piece), COUNT, False, ALIGNED)
        score = tl.dot(queries_of(own, query_rows, valid, piece, RANKS), keys, score, input_precision=PRECISION)
    return score


@triton.jit
def masked_score(
    own, query_rows, valid, key_rows, first, position, earliest, start, stop, scale, RANKS: tl.constexpr,
    SIZES: tl.constexpr, GAINS: tl.constexpr, BY_WINDOW: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return scaled scores `(ROWS, COUNT)`, `-inf` where hidden, for pairs of any depth."""
    j = first - start + tl.arange(0, COUNT)
    score = tl.zeros((ROWS, COUNT), tl.float32)
    gain = tl.full((ROWS, COUNT), GAINS[0], tl.float32)
    for piece in tl.static_range(len(RANKS)):
        # No row shares this level with a key before the block or window of the earliest query.
        edge = start + first_reached(earliest, SIZES[piece], BY_WINDOW)
        keys = load_keys(key_rows[piece], first, edge, stop, static.item(RANKS, piece), COUNT, True, ALIGNED)
        pairs = reached(position, j, SIZES[piece], BY_WINDOW)
        products = tl.dot(queries_of(own, query_rows, valid, piece, RANKS), keys, input_precision=PRECISION)
        score += tl.where(pairs, products, 0.0)
        if static.differ(GAINS, 0, len(GAINS)):
            gain = tl.where(pairs, GAINS[piece], gain)
    visible = valid[:, None] & ((j >= 0) & (j < stop - start))[None, :] & (j[None, :] <= position[:, None])
    if BY_WINDOW:
        visible = visible & reached(position, j, SIZES[0], BY_WINDOW)
    return tl.where(visible, score * gain * scale, float("-inf"))


@triton.jit
def softmax_step(score, top, total):
    """Return probabilities, the decay of earlier ones, new maximum and sum."""
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without visible keys so far
    probability, decay = tl.exp2(score - base[:, None]), tl.exp2(top - base)
    return probability, decay, new_top, total * decay + tl.sum(probability, 1)


@triton.jit
def mixed(
    total, probability, decay, rows, first, low, high, WIDTH: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `total · decay` plus probabilities times values, at `low … high` where MASKED."""
    at, stride = rows
    width: tl.constexpr = static.padded(WIDTH)
    values = tiles.load(at, stride, first, low, high, 0, WIDTH, COUNT, width, MASKED, width > WIDTH)
    return tl.dot(probability.to(values.dtype), values, total * decay[:, None], input_precision=PRECISION)


@triton.jit
def attend_run(
    own, query_rows, valid, key_rows, value_rows, result, top, total, first, stop, scale, PIECE: tl.constexpr,
    COUNT: tl.constexpr, STAGES: tl.constexpr, BLOCK_K: tl.constexpr, RANKS: tl.constexpr, SIZES: tl.constexpr,
    GAINS: tl.constexpr, VALUES: tl.constexpr, VALUE_SIZES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles `first … stop` of a run; return the new state.

    The state is mixed values, maximum and sum. A step takes `COUNT` keys. Value levels that do not reach the run are
    still zero, since their runs come later.
    """
    for tile in tl.range(first, stop, COUNT // BLOCK_K, num_stages=STAGES):
        at = tile * BLOCK_K
        score = run_score(own, query_rows, valid, key_rows, at, PIECE, COUNT, RANKS, ROWS, PRECISION, ALIGNED)
        probability, decay, top, total = softmax_step(score * (GAINS[PIECE] * scale), top, total)
        added = ()
        for level in tl.static_range(len(VALUES)):
            if static.item(VALUE_SIZES, level) >= static.item(SIZES, PIECE):
                more = mixed(
                    result[level], probability, decay, value_rows[level], at, 0, 0, static.item(VALUES, level), COUNT,
                    False, PRECISION,
                )  # fmt: skip
                added = added + (more,)
            else:
                added = added + (result[level],)
        result = added
    return result, top, total


@triton.jit
def attend_others(
    own, query_rows, valid, key_rows, value_rows, result, top, total, low, others, runs, position, earliest, start,
    key_length, scale, STAGES: tl.constexpr, BLOCK_K: tl.constexpr, RANKS: tl.constexpr, SIZES: tl.constexpr,
    GAINS: tl.constexpr, VALUES: tl.constexpr, VALUE_SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Attend to the first `others` tiles from `low` outside all runs."""
    for other in tl.range(0, others, num_stages=STAGES):
        at = skip_runs(low + other, runs) * BLOCK_K
        j = at - start + tl.arange(0, BLOCK_K)
        score = masked_score(
            own, query_rows, valid, key_rows, at, position, earliest, start, key_length, scale, RANKS, SIZES, GAINS,
            BY_WINDOW, ROWS, BLOCK_K, PRECISION, ALIGNED,
        )  # fmt: skip
        probability, decay, top, total = softmax_step(score, top, total)
        added = ()
        for level in tl.static_range(len(VALUES)):
            weights = probability
            if static.item(VALUE_SIZES, level) != WHOLE:
                pairs = reached(position, j, static.item(VALUE_SIZES, level), BY_WINDOW)
                weights = tl.where(pairs, probability, 0.0)
            edge = start + first_reached(earliest, static.item(VALUE_SIZES, level), BY_WINDOW)
            more = mixed(
                result[level], weights, decay, value_rows[level], at, edge, key_length, static.item(VALUES, level),
                BLOCK_K, True, PRECISION,
            )  # fmt: skip
            added = added + (more,)
        result = added
    return result, top, total
