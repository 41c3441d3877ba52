"""Decode: a few queries against a long cache, keys and values level by level, keys dimension-major.

Keys are split over programs, each of which writes its share of the softmax; a second kernel joins the shares.

A *row* is a query of one of the query heads that share a key head: `rows = group · Tq`, row `g · Tq + i`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structattn.ops.call import DecodeCall
from structattn.ops.triton import launch, parts, static, tiles
from structattn.ops.triton.tiles import LOG2E

WHOLE = tl.constexpr(parts.WHOLE)

# (BLOCK_K, warps, stages) by the wider of r and dv, doubled for float32, as for attention.
BLOCKS = {64: (128, 4, 3), 128: (128, 4, 2), 256: (64, 8, 2), 1024: (32, 8, 1)}
# Dimensions per product at most, by the bytes of a number: wider ones do not fit in registers.
PIECE = {2: 64, 4: 32}
# Programs per multiprocessor that hide the latency of memory, and the fewest tiles of keys worth a program.
PROGRAMS, LEAST_TILES = 4, 2


@triton.jit(do_not_specialize=["key_length", "first_key", "level_starts", "value_starts", "share"])
def share_kernel(
    query, key_levels, value_levels, key_start, shares, tops, totals,
    query_strides, level_strides, value_strides, level_starts, value_starts,
    key_heads, rows, queries, key_length, first_key, share, splits, scale,
    RANKS: tl.constexpr, SIZES: tl.constexpr, GAINS: tl.constexpr, VALUES: tl.constexpr, VALUE_SIZES: tl.constexpr,
    BY_WINDOW: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the share of keys `first_key + split · share` and on: mixed values, maximum and sum, in units of log 2."""
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    row_tiles = (rows + ROWS - 1) // ROWS
    pair, row = tile // row_tiles, tile % row_tiles * ROWS + tl.arange(0, ROWS)
    batch, key_head = pair // key_heads, pair % key_heads
    start = 0
    if key_start is not None:
        start = tl.load(key_start + batch).to(tl.int32)
    begin, stop = split * share, (split + 1) * share
    if BY_WINDOW:
        begin, stop = begin + first_key, stop + first_key
    begin, stop = tl.maximum(begin, start), tl.minimum(stop, key_length)
    position = key_length - queries + row % queries - start
    valid = (row < rows) & (position >= 0)
    earliest = tl.maximum(key_length - queries - start, 0)

    head = key_head * (rows // queries) + row // queries
    at = batch.to(tl.int64) * query_strides[0] + head.to(tl.int64) * query_strides[1]
    at += (row % queries).to(tl.int64) * query_strides[2]
    own = ()
    if static.is_resident(RANKS):
        for level in tl.static_range(len(RANKS)):
            own = own + (load_level(query + at, valid, level, RANKS, static.item(RANKS, level)),)
    result, value_rows = (), ()
    for piece in tl.static_range(len(VALUES)):
        result = result + (tl.zeros((ROWS, static.padded(static.item(VALUES, piece))), tl.float32),)
        step = tl.cast(value_strides[3 * piece + 2], tl.int64)
        at_values = value_levels[piece] + batch.to(tl.int64) * value_strides[3 * piece]
        at_values += key_head.to(tl.int64) * value_strides[3 * piece + 1]
        at_values -= value_starts[piece] * step
        value_rows = value_rows + ((at_values, step),)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(begin, stop, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        score = tl.zeros((ROWS, BLOCK_K), tl.float32)
        gain = tl.full((ROWS, BLOCK_K), GAINS[0], tl.float32)
        for level in tl.static_range(len(RANKS)):
            # No row shares this level with a key before the block or window of the earliest query.
            edge = start + first_reached(earliest, SIZES[level], BY_WINDOW)
            if first + BLOCK_K > edge:
                rows_at = key_levels[level] + batch.to(tl.int64) * level_strides[3 * level]
                rows_at += key_head.to(tl.int64) * level_strides[3 * level + 1] - level_starts[level]
                keys = load_keys(rows_at, level_strides[3 * level + 2], j, edge, stop, static.item(RANKS, level))
                if not static.is_resident(RANKS):
                    own_level = load_level(query + at, valid, level, RANKS, static.item(RANKS, level))
                else:
                    own_level = own[level]
                pairs = tiles.reached(position, j - start, SIZES[level], BY_WINDOW)
                score += tl.where(pairs, tl.dot(own_level, keys, input_precision=PRECISION), 0.0)
                gain = tl.where(pairs, GAINS[level], gain)
        visible = valid[:, None] & ((j < stop)[None, :] & ((j - start)[None, :] <= position[:, None]))
        if BY_WINDOW:
            visible = visible & tiles.reached(position, j - start, SIZES[0], BY_WINDOW)
        score = tl.where(visible, score * gain * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        probability, decay = tl.exp2(score - base[:, None]), tl.exp2(top - base)
        total = total * decay + tl.sum(probability, 1)
        mixed = ()
        for piece in tl.static_range(len(VALUES)):
            added = add_values(
                result[piece] * decay[:, None], probability, value_rows[piece], position, start,
                earliest, first, stop, static.item(VALUES, piece), static.item(VALUE_SIZES, piece), BY_WINDOW, ROWS,
                BLOCK_K, PRECISION,
            )  # fmt: skip
            mixed = mixed + (added,)
        result = mixed
        top = new_top

    to = (pair.to(tl.int64) * splits + split) * rows + row
    for piece in tl.static_range(len(VALUES)):
        columns = tl.arange(0, static.padded(static.item(VALUES, piece)))
        inside = (row < rows)[:, None] & (columns < static.item(VALUES, piece))[None, :]
        columns += static.prefix(VALUES, piece)
        at = shares + to[:, None] * static.prefix(VALUES, len(VALUES)) + columns[None, :]
        tl.store(at, result[piece], mask=inside)
    tl.store(tops + to, top, mask=row < rows)
    tl.store(totals + to, total, mask=row < rows)


@triton.jit
def first_reached(position, SIZE: tl.constexpr, BY_WINDOW: tl.constexpr):
    """Return the first position that a level reaches from `position`."""
    if BY_WINDOW:
        return tl.maximum(position - (SIZE - 1), 0)
    else:
        return position // SIZE * SIZE


@triton.jit
def add_values(
    total, probability, rows, position, start, earliest, first, stop, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    BY_WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `total` plus a level's values at indices `first … stop`, weighted by the probabilities it reaches.

    `rows` are a pointer to the value of index 0 and the stride of rows.
    """
    edge = start + first_reached(earliest, SIZE, BY_WINDOW)
    if SIZE == WHOLE:
        total = weighted(total, probability, rows, first, first, stop, WIDTH, BLOCK_K, PRECISION)
    elif first + BLOCK_K > edge:
        pairs = tiles.reached(position, first - start + tl.arange(0, BLOCK_K), SIZE, BY_WINDOW)
        reached = tl.where(pairs, probability, 0.0)
        total = weighted(total, reached, rows, first, edge, stop, WIDTH, BLOCK_K, PRECISION)
    return total


@triton.jit
def weighted(
    total, probability, rows, first, low, stop, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """Return `total` plus probabilities times values at indices `low … stop` of a tile from `first` on."""
    at, stride = rows
    width: tl.constexpr = static.padded(WIDTH)
    values = tiles.load(at, stride, first, low, stop, 0, WIDTH, BLOCK_K, width, True, width > WIDTH)
    return tl.dot(probability.to(values.dtype), values, total, input_precision=PRECISION)


@triton.jit
def load_keys(rows, stride, j, low, high, RANK: tl.constexpr):
    """Return a level's keys at indices `j`, `(r_l padded, n)`, zeros outside `low … high`."""
    dims = tl.arange(0, static.padded(RANK))
    inside = (dims < RANK)[:, None] & ((j >= low) & (j < high))[None, :]
    return tl.load(rows + dims[:, None].to(tl.int64) * stride + j[None, :], mask=inside, other=0.0)


@triton.jit
def load_level(rows, valid, level: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr):
    """Return a level's dimensions of the queries, `(ROWS, r_l padded)`."""
    dims = tl.arange(0, static.padded(RANK))
    inside = valid[:, None] & (dims < RANK)[None, :]
    return tl.load(rows[:, None] + static.prefix(RANKS, level) + dims[None, :], mask=inside, other=0.0)


@triton.jit
def join_kernel(shares, tops, totals, out, rows, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Write one row's output from the shares of all splits; zeros if no key is visible."""
    pair, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    split = tl.arange(0, SPLITS)
    columns = tl.arange(0, static.padded(WIDTH))
    at = (pair.to(tl.int64) * splits + split) * rows + row
    top = tl.load(tops + at, mask=split < splits, other=float("-inf"))
    most = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight * tl.load(totals + at, mask=split < splits, other=0.0), 0)
    inside = (split < splits)[:, None] & (columns < WIDTH)[None, :]
    share = tl.load(shares + at[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    result = tl.sum(share * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    to = out + tl.program_id(0).to(tl.int64) * WIDTH + columns
    tl.store(to, result.to(out.dtype.element_ty), mask=columns < WIDTH)


def decode(call: DecodeCall) -> Tensor:
    """Return the output `(B, Hq, Tq, dv)` of `mlr_decode`."""
    hierarchy, key_length = call.hierarchy, call.key_length
    (batch, heads, queries, _), (_, key_heads, _, _) = call.query.shape, call.value_levels[0].shape
    out = call.query.new_empty(batch, heads, queries, call.value_dim)
    if not out.numel():
        return out
    query, width, sizes = launch.unit_stride(call.query), call.value_dim, launch.sizes(hierarchy)
    pieces = pieces_of(hierarchy.ranks, PIECE[query.dtype.itemsize])
    levels = [launch.unit_stride(call.key_levels[level][..., low:high, :]) for level, low, high in pieces]
    owners = [level for level, values in enumerate(call.value_levels) if values.shape[3]]
    values = [launch.unit_stride(call.value_levels[level]) for level in owners]
    block, warps, stages = BLOCKS[launch.width_class(hierarchy.rank, width, query.dtype)]
    if hierarchy.by_window:
        block = max(block // 2, 32)  # masks of pairs take registers
    rows, pairs = heads // key_heads * queries, batch * key_heads
    tile = min(static.padded(rows), 64)
    row_tiles = triton.cdiv(rows, tile)
    first_key = max(key_length - queries - sizes[0] + 1, 0) if hierarchy.by_window else 0
    share = keys_per_program(key_length - first_key, pairs * row_tiles, query, block)
    splits = triton.cdiv(key_length - first_key, share)
    shares = torch.empty(pairs, splits, rows, width, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, pairs, splits, rows, dtype=torch.float32, device=query.device)
    with launch.on_device(query):
        share_kernel[(pairs * row_tiles * splits,)](
            query, tuple(levels), tuple(values), call.key_start, shares, tops, totals,
            query.stride(), row_strides(levels), row_strides(values),
            tuple(call.level_starts[level] for level, _, _ in pieces),
            tuple(call.level_starts[level] for level in owners),
            key_heads, rows, queries, key_length, first_key, share, splits, call.scale,
            RANKS=tuple(high - low for _, low, high in pieces), SIZES=tuple(sizes[level] for level, _, _ in pieces),
            GAINS=tuple(hierarchy.gains[level] for level, _, _ in pieces),
            VALUES=tuple(each.shape[3] for each in values), VALUE_SIZES=tuple(sizes[level] for level in owners),
            BY_WINDOW=hierarchy.by_window, PRECISION=launch.precision(), ROWS=tile, BLOCK_K=block, num_warps=warps,
            num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        join_kernel[(pairs * rows,)](
            shares, tops, totals, out, rows, splits, WIDTH=width, SPLITS=triton.next_power_of_2(splits),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def row_strides(tensors: list[Tensor]) -> tuple[int, ...]:
    """Return the strides of all axes but the last, tensor after tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def pieces_of(ranks: tuple[int, ...], widest: int) -> list[tuple[int, int, int]]:
    """Return `(level, first, stop)` of the dimensions of each product; a wide level takes several."""
    return [(level, low, min(low + widest, rank)) for level, rank in enumerate(ranks) for low in range(0, rank, widest)]


def keys_per_program(key_length: int, tasks: int, query: Tensor, block: int) -> int:
    """Return keys per program, in whole tiles, so that every multiprocessor is busy."""
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    key_tiles = triton.cdiv(key_length, block)
    splits = max(1, min(PROGRAMS * processors // tasks, key_tiles // LEAST_TILES))
    return int(triton.cdiv(key_tiles, splits)) * block
