"""Functions that the kernels share: bounds of tiles, products, and gradients.

A program holds one tile of queries or keys, its *own* `A` positions. It streams tiles of `B` positions of the *other*
side past it. Depth is symmetric, so the forward kernel and both gradient kernels share all this.

By block, take a level whose block holds the whole own tile. The positions of that block outside the next finer block
are all at one depth. They are *far*: only the level's prefix is loaded and multiplied. The rest is *near*: depth varies
there or the causal mask cuts, so the finer levels are added one by one.

By window, positions far enough from the edges of two windows are at one depth, and *far* too. At each edge lies a
*band* about as wide as the own tile, where that level is added under a mask. Edges closer together than a tile make one
band with several levels. The part at the own tile's positions is near. Far runs and bands lie on both sides of the own
tile, as in a mirror.

The r dimensions are cut into chunks. These are powers of two, whose edges are the prefix ranks rounded up to `STEP`
(16, the tensor core's step, or more). Values are cut likewise; values that level 1 owns alone are one chunk. Far levels
whose prefixes end at one edge differ only in numbers, so they share the code of one part of `PARTS`. Own rows are cut
to the prefix. Chunks of the other side are loaded whole, because a mask inside a chunk would break up its loads.

`WIDTHS` are the ranks or the value dimensions of each level. Positions count from the row's first valid key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from structattn.ops.triton import parts, static

LOG2E = tl.constexpr(1.4426950408889634)

# --- numbers of a level -----------------------------------------------------------------------------------------------


@triton.jit
def pick(VALUES: tl.constexpr, index):
    """Return `VALUES[index]` for an index known only at run time."""
    value = VALUES[0]
    for at in tl.static_range(1, len(VALUES)):
        value = tl.where(index == at, VALUES[at], value)
    return value


@triton.jit
def prefix_at(level, WIDTHS: tl.constexpr):
    """Return the width of the levels up to a run-time `level`."""
    value = WIDTHS[0]
    for at in tl.static_range(1, len(WIDTHS)):
        value = tl.where(level == at, static.prefix(WIDTHS, at + 1), value)
    return value


# --- where tiles lie --------------------------------------------------------------------------------------------------


@triton.jit
def row_of(key_start, key_end, batch, key_length, query_offset):
    """Return a row's first valid key, number of keys, and query position."""
    start = 0
    end = key_length
    if key_start is not None:
        start = tl.load(key_start + batch).to(tl.int32)
    if key_end is not None:
        end = tl.load(key_end + batch).to(tl.int32)
    return start, end - start, query_offset - start


@triton.jit
def query_tile(
    key_start, key_end, batch_heads, heads, query_length, key_length, query_offset, BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return the tile of queries of this program.

    Programs go through heads and, within each, through tiles. The result is `b * heads + h`, `b` and `h` of the head;
    first valid key, number of valid keys and position of query 0 of the row; start and stop of the row's query
    positions; first position of the tile, at or past the stop if the tile is empty.
    """
    query_tiles = tl.num_programs(0) // batch_heads
    pair, tile = tl.program_id(0) // query_tiles, tl.program_id(0) % query_tiles
    if CAUSAL:
        tile = query_tiles - 1 - tile  # longest first
    batch, head = pair // heads, pair % heads
    start, keys, offset = row_of(key_start, key_end, batch, key_length, query_offset)
    low, high = tl.maximum(offset, 0), offset + query_length
    return pair, batch, head, start, keys, offset, low, high, (low // BLOCK_Q + tile) * BLOCK_Q


@triton.jit
def span(first, size, A: tl.constexpr):
    """Return the outer edges of the blocks that `first … first + A` touches."""
    return first // size * size, (first + A - 1) // size * size + size


@triton.jit
def inner(first, level, A: tl.constexpr, SIZES: tl.constexpr, CAUSAL: tl.constexpr):
    """Return start and stop of what a level's far part leaves out.

    These are the next finer blocks or, at the last level, the positions that the causal mask cuts.
    """
    if CAUSAL:
        start, stop = first, first + A
    else:
        start, _ = span(first, SIZES[len(SIZES) - 1], A)
        stop = start
    if len(SIZES) > 1:
        last = level == len(SIZES) - 1
        finer_start, finer_stop = span(first, pick(SIZES, tl.minimum(level + 1, len(SIZES) - 1)), A)
        start, stop = tl.where(last, start, finer_start), tl.where(last, stop, finer_stop)
    return start, stop


@triton.jit
def far_bounds(first, level, low, high, A: tl.constexpr, SIZES: tl.constexpr, CAUSAL: tl.constexpr):
    """Return start and stop of a level's two far runs."""
    size = pick(SIZES, level)
    start, stop = span(first, size, A)
    inner_start, inner_stop = inner(first, level, A, SIZES, CAUSAL)
    crosses = stop - start != size  # then all of this level's blocks are near
    start, stop = tl.where(crosses, inner_start, start), tl.where(crosses, inner_stop, stop)
    return tl.maximum(start, low), tl.minimum(inner_start, high), tl.maximum(inner_stop, low), tl.minimum(stop, high)


@triton.jit
def near_bounds(first, low, high, WHOLE: tl.constexpr, A: tl.constexpr, SIZES: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the near run's start and stop; the second run is empty."""
    start, stop = inner(first, len(SIZES) - 1, A, SIZES, CAUSAL)
    for back in tl.static_range(len(SIZES) - WHOLE):
        size = SIZES[len(SIZES) - 1 - back]
        block_start, block_stop = span(first, size, A)
        crosses = block_stop - block_start != size
        start, stop = tl.where(crosses, block_start, start), tl.where(crosses, block_stop, stop)
    return tl.maximum(start, low), tl.minimum(stop, high), 0, 0


@triton.jit
def window_bounds(first, level, low, high, PARTS: tl.constexpr, PART: tl.constexpr, A: tl.constexpr):
    """Return a run and its mirror image, or one around the tile."""
    at = level - parts.field(PARTS, PART, "first")
    start, stop = pick(parts.field(PARTS, PART, "starts"), at), pick(parts.field(PARTS, PART, "stops"), at)
    left, left_stop = tl.maximum(first + start, low), tl.minimum(first + stop, high)
    if parts.field(PARTS, PART, "own"):
        return left, left_stop, 0, 0
    else:
        return left, left_stop, tl.maximum(first + A - stop, low), tl.minimum(first + A - start, high)


@triton.jit
def bounds(
    first, level, low, high, PARTS: tl.constexpr, PART: tl.constexpr, A: tl.constexpr, SIZES: tl.constexpr,
    BY_WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return a part's two runs for a level, within `low … high`."""
    if BY_WINDOW:
        return window_bounds(first, level, low, high, PARTS, PART, A)
    elif parts.field(PARTS, PART, "far"):
        return far_bounds(first, level, low, high, A, SIZES, CAUSAL)
    else:
        return near_bounds(first, low, high, parts.whole_levels(PARTS, PART), A, SIZES, CAUSAL)


@triton.jit
def steps(runs, B: tl.constexpr):
    """Return the number of tiles of B positions in two runs."""
    left, left_stop, right, right_stop = runs
    return tl.maximum(left_stop - left + B - 1, 0) // B + tl.maximum(right_stop - right + B - 1, 0) // B


@triton.jit
def tile_at(step, runs, B: tl.constexpr):
    """Return a step's first position, and the stop of its run."""
    left, left_stop, right, right_stop = runs
    count = tl.maximum(left_stop - left + B - 1, 0) // B
    on_left = step < count
    first = tl.where(on_left, left + step * B, right + (step - count) * B)
    return first, tl.where(on_left, left_stop, right_stop)


@triton.jit
def rows_of(tensor, strides, batch, head, shift):
    """Return a pointer to a head's row `shift`, and the stride."""
    step = tl.cast(strides[2], tl.int64)
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + shift * step, step


@triton.jit
def bias_shift(strides, batch, head, query_shift, key_shift):
    """Return the offset of a head's positions (0, 0) in a bias."""
    shift = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return shift + tl.cast(query_shift, tl.int64) * strides[2] + tl.cast(key_shift, tl.int64) * strides[3]


# --- loads ------------------------------------------------------------------------------------------------------------


@triton.jit
def load(
    rows, stride, first, low, high, start, stop, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Return `WIDTH` dimensions from `start` of `COUNT` rows from `first`.

    Where MASKED, rows outside `low … high` are 0; where CUT, so are dimensions from `stop` on.
    """
    offset = tl.arange(0, COUNT)
    dims = start + tl.arange(0, WIDTH)
    at = rows + first * stride + offset[:, None] * stride + dims[None, :]
    valid = ((first + offset >= low) & (first + offset < high))[:, None]
    inside = (dims < stop)[None, :]
    if MASKED and CUT:
        return tl.load(at, mask=valid & inside, other=0.0)
    elif MASKED:
        return tl.load(at, mask=valid, other=0.0)
    elif CUT:
        return tl.load(at, mask=inside, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_rows(numbers, position, stop, other, MASKED: tl.constexpr):
    """Return a number for each position; where MASKED, `other` from `stop` on."""
    if MASKED:
        return tl.load(numbers + position, mask=position < stop, other=other)
    else:
        return tl.load(numbers + position)


@triton.jit
def load_chunk(
    side, COUNT: tl.constexpr, CHUNK: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr
):
    """Return one chunk of a side's tile, `(COUNT, width)`.

    A side is (rows, stride, first, low, high): pointer to position 0, the tile's first position, its valid range.
    """
    rows, stride, first, low, high = side
    start: tl.constexpr = static.chunk_start(WIDTHS, STEP, CHUNK)
    width: tl.constexpr = static.chunk_width(WIDTHS, STEP, CHUNK)
    end: tl.constexpr = static.prefix(WIDTHS, len(WIDTHS))
    return load(rows, stride, first, low, high, start, end, COUNT, width, MASKED, start + width > end)


@triton.jit
def load_own(side, A: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr):
    """Return the own tile's chunks, or none if rows are too wide."""
    chunks = ()
    if static.is_resident(WIDTHS):
        for c in tl.static_range(static.chunk_count(WIDTHS, STEP)):
            chunks = chunks + (load_chunk(side, A, c, WIDTHS, STEP, True),)
    return chunks


# --- products and their gradients -------------------------------------------------------------------------------------


@triton.jit
def cut(x, first, start, stop):
    """Zero the dimensions of `x (…, width)` outside `start … stop`."""
    dims = first + tl.arange(0, x.shape[1])
    return tl.where(((dims >= start) & (dims < stop))[None, :], x, 0.0)


@triton.jit
def add_products(
    total, own, own_side, other_side, start, stop, FROM: tl.constexpr, TO: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add products over `start … stop`, in chunks of `FROM … TO`, to `total`."""
    if static.is_resident(WIDTHS):
        for c in tl.static_range(static.chunk_count(WIDTHS, STEP)):
            if static.overlaps(WIDTHS, STEP, c, FROM, TO):
                other = load_chunk(other_side, B, c, WIDTHS, STEP, MASKED)
                mine = own[c]
                if not static.within(WIDTHS, STEP, c, FROM, TO):
                    mine = cut(mine, static.chunk_start(WIDTHS, STEP, c), start, stop)
                total = tl.dot(mine, tl.trans(other), total, input_precision=PRECISION)
    else:
        end: tl.constexpr = static.prefix(WIDTHS, len(WIDTHS))
        width: tl.constexpr = 128
        rows, stride, first, low, high = other_side
        own_rows, own_stride, own_first, own_low, own_high = own_side
        for at in range(FROM // width * width, TO, width):
            mine = load(own_rows, own_stride, own_first, own_low, own_high, at, end, A, width, True, True)
            other = load(rows, stride, first, low, high, at, end, B, width, MASKED, True)
            total = tl.dot(cut(mine, at, start, stop), tl.trans(other), total, input_precision=PRECISION)
    return total


@triton.jit
def reached(mine, theirs, SIZE: tl.constexpr, BY_WINDOW: tl.constexpr):
    """Return `(A, B)`, True for pairs that a level reaches."""
    if BY_WINDOW:
        return tl.abs(mine[:, None] - theirs[None, :]) < SIZE
    else:
        return (mine // SIZE)[:, None] == (theirs // SIZE)[None, :]


@triton.jit
def gain_of(
    own_first, first, level, PARTS: tl.constexpr, PART: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, GAINS: tl.constexpr,
):  # fmt: skip
    """Return the gain of the pairs of two tiles: one number, or `(A, B)` where it varies."""
    whole: tl.constexpr = parts.whole_levels(PARTS, PART)
    if parts.field(PARTS, PART, "far"):
        return pick(GAINS, level) * 1.0
    elif not static.differ(GAINS, whole - 1, parts.field(PARTS, PART, "partial")):
        return GAINS[whole - 1] * 1.0
    else:
        mine, theirs = own_first + tl.arange(0, A), first + tl.arange(0, B)
        gain = tl.full((A, B), GAINS[whole - 1], tl.float32)
        for finer in tl.static_range(whole, parts.field(PARTS, PART, "partial")):
            gain = tl.where(reached(mine, theirs, SIZES[finer], BY_WINDOW), GAINS[finer], gain)
        return gain


@triton.jit
def products(
    own, own_side, other_side, level, PARTS: tl.constexpr, PART: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    WIDTHS: tl.constexpr, SIZES: tl.constexpr, BY_WINDOW: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `own · other` over the dimensions that each pair shares.

    The result is `(A, B)` float32, for tiles of a part; `level` is that of a far part. Products of queries and keys are
    scores. Products of values and the output's gradient are gradients of probabilities.
    """
    MASKED: tl.constexpr = parts.field(PARTS, PART, "masked")
    total = tl.zeros((A, B), tl.float32)
    if parts.field(PARTS, PART, "far"):
        # Only chunks past the narrowest prefix of the part's levels may have to be cut.
        least: tl.constexpr = static.prefix(WIDTHS, parts.field(PARTS, PART, "first") + 1)
        stop = prefix_at(level, WIDTHS)
        total = add_products(total, own, own_side, other_side, 0, stop, 0, least, A, B, WIDTHS, STEP, MASKED, PRECISION)
    else:
        mine, theirs = own_side[2] + tl.arange(0, A), other_side[2] + tl.arange(0, B)
        whole: tl.constexpr = parts.whole_levels(PARTS, PART)
        shared: tl.constexpr = static.prefix(WIDTHS, whole)
        total = add_products(
            total, own, own_side, other_side, 0, shared, 0, shared, A, B, WIDTHS, STEP, MASKED, PRECISION
        )
        for finer in tl.static_range(whole, parts.field(PARTS, PART, "partial")):
            if static.item(WIDTHS, finer) > 0:
                added = add_products(
                    tl.zeros((A, B), tl.float32), own, own_side, other_side,
                    static.prefix(WIDTHS, finer), static.prefix(WIDTHS, finer + 1),
                    static.prefix(WIDTHS, finer), static.prefix(WIDTHS, finer + 1), A, B, WIDTHS, STEP, MASKED,
                    PRECISION,
                )  # fmt: skip
                total += tl.where(reached(mine, theirs, SIZES[finer], BY_WINDOW), added, 0.0)
    return total


@triton.jit
def add_mixed_chunks(
    totals, weights, other_side, start, stop, FROM: tl.constexpr, TO: tl.constexpr, CHUNKS: tl.constexpr,
    B: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `weights (A, B)` times the other rows, over dimensions `start … stop`."""
    added = ()
    for c in tl.static_range(static.item(CHUNKS, 0), static.item(CHUNKS, 1)):
        total = totals[c - static.item(CHUNKS, 0)]
        if static.overlaps(WIDTHS, STEP, c, FROM, TO):
            other = load_chunk(other_side, B, c, WIDTHS, STEP, MASKED)
            if static.within(WIDTHS, STEP, c, FROM, TO):
                total = tl.dot(weights.to(other.dtype), other, total, input_precision=PRECISION)
            else:
                more = tl.dot(weights.to(other.dtype), other, input_precision=PRECISION)
                total += cut(more, static.chunk_start(WIDTHS, STEP, c), start, stop)
        added = added + (total,)
    return added


@triton.jit
def add_mixed(
    totals, weights, own_first, other_side, level, PARTS: tl.constexpr, PART: tl.constexpr, CHUNKS: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, WIDTHS: tl.constexpr, SIZES: tl.constexpr, BY_WINDOW: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `weights (A, B)` times the other rows, over dimensions that pairs share.

    `totals` are the chunks `CHUNKS[0] … CHUNKS[1]`. So probabilities mix values, and gradients of scores mix keys: the
    gradient of `products` with respect to own rows.
    """
    MASKED: tl.constexpr = parts.field(PARTS, PART, "masked")
    if parts.field(PARTS, PART, "far"):
        least: tl.constexpr = static.prefix(WIDTHS, parts.field(PARTS, PART, "first") + 1)
        stop = prefix_at(level, WIDTHS)
        totals = add_mixed_chunks(
            totals, weights, other_side, 0, stop, 0, least, CHUNKS, B, WIDTHS, STEP, MASKED, PRECISION
        )
    else:
        mine, theirs = own_first + tl.arange(0, A), other_side[2] + tl.arange(0, B)
        whole: tl.constexpr = parts.whole_levels(PARTS, PART)
        shared: tl.constexpr = static.prefix(WIDTHS, whole)
        totals = add_mixed_chunks(
            totals, weights, other_side, 0, shared, 0, shared, CHUNKS, B, WIDTHS, STEP, MASKED, PRECISION
        )
        for finer in tl.static_range(whole, parts.field(PARTS, PART, "partial")):
            if static.item(WIDTHS, finer) > 0:
                totals = add_mixed_chunks(
                    totals, tl.where(reached(mine, theirs, SIZES[finer], BY_WINDOW), weights, 0.0), other_side,
                    static.prefix(WIDTHS, finer), static.prefix(WIDTHS, finer + 1),
                    static.prefix(WIDTHS, finer), static.prefix(WIDTHS, finer + 1), CHUNKS, B, WIDTHS, STEP, MASKED,
                    PRECISION,
                )  # fmt: skip
    return totals


@triton.jit
def decay_chunks(totals, decay, PARTS: tl.constexpr, PART: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr):
    """Multiply chunks by `decay (A,)`, except those that are still zero."""
    reach: tl.constexpr = static.prefix(WIDTHS, parts.field(PARTS, PART, "partial"))
    decayed = ()
    for c in tl.static_range(static.chunk_count(WIDTHS, STEP)):
        if static.overlaps(WIDTHS, STEP, c, 0, reach):
            decayed = decayed + (totals[c] * decay[:, None],)
        else:
            decayed = decayed + (totals[c],)
    return decayed


@triton.jit
def divided(chunks, divisor):
    """Return chunks divided by `(A, 1)`."""
    quotients = ()
    for c in tl.static_range(len(chunks)):
        quotients = quotients + (chunks[c] / divisor,)
    return quotients


@triton.jit
def zero_chunks(CHUNKS: tl.constexpr, A: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr):
    """Return a tuple of zeros for chunks `CHUNKS[0] … CHUNKS[1]`."""
    chunks = ()
    for c in tl.static_range(static.item(CHUNKS, 0), static.item(CHUNKS, 1)):
        chunks = chunks + (tl.zeros((A, static.chunk_width(WIDTHS, STEP, c)), tl.float32),)
    return chunks


@triton.jit
def store_chunks(
    to, row, chunks, own_side, scale, CHUNKS: tl.constexpr, A: tl.constexpr, WIDTHS: tl.constexpr, STEP: tl.constexpr
):
    """Write `scale` times chunks to contiguous rows; position 0 is at `row`."""
    end: tl.constexpr = static.prefix(WIDTHS, len(WIDTHS))
    _, _, first, low, high = own_side
    position = first + tl.arange(0, A)
    valid = (position >= low) & (position < high)
    for c in tl.static_range(static.item(CHUNKS, 0), static.item(CHUNKS, 1)):
        dims = static.chunk_start(WIDTHS, STEP, c) + tl.arange(0, static.chunk_width(WIDTHS, STEP, c))
        at = to + (row + position)[:, None] * end + dims[None, :]
        chunk = (chunks[c - static.item(CHUNKS, 0)] * scale).to(to.dtype.element_ty)
        tl.store(at, chunk, mask=valid[:, None] & (dims < end)[None, :])


# --- masks and dropout ------------------------------------------------------------------------------------------------


@triton.jit
def finish_scores(
    score, i, j, query_low, query_high, key_high, bias, shift, bias_strides, PARTS: tl.constexpr, PART: tl.constexpr,
    SIZES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return scores in units of log 2, biased and masked.

    Hidden pairs score `-inf`; `i` and `j` broadcast to (A, B). Full tiles need no mask. The causal mask cuts only in
    the part of the own tile, a finite window only in its band.
    """
    visible = (i >= query_low) & (i < query_high) & (j < key_high)
    if bias is not None:
        at = bias + shift + i.to(tl.int64) * bias_strides[2] + j.to(tl.int64) * bias_strides[3]
        score += tl.load(at, mask=visible, other=0.0).to(tl.float32) * LOG2E
    if CAUSAL and parts.field(PARTS, PART, "own"):
        visible = visible & (j <= i)
    if parts.hides_far_pairs(PARTS, PART):
        visible = visible & (tl.abs(i - j) < SIZES[0])
    if parts.field(PARTS, PART, "masked") or parts.hides_far_pairs(PARTS, PART):
        score = tl.where(visible, score, float("-inf"))
    return score


@triton.jit
def mix(x):
    """Return the 32-bit hash of `structattn.ops.dropout`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_factor(seed, pair, i, j, threshold, keep_scale):
    """Return each pair's dropout factor, 0 or `1/(1 - p)`."""
    word = tl.load(seed)
    state = mix(mix(word.to(tl.uint32)) ^ (word >> 32).to(tl.uint32))
    row = mix(mix(state + pair.to(tl.uint32) * 0x9E3779B9) + i.to(tl.uint32) * 0x85EBCA6B)
    kept = mix(row + j.to(tl.uint32) * 0xC2B2AE35) >= threshold.to(tl.uint32)
    return tl.where(kept, keep_scale, 0.0)
