"""Decode: a few queries against a long cache of keys, level by level and dimension-major.

Keys are split over programs, each of which writes its share of the softmax; a second kernel joins the shares.

A *row* is a query of one of the query heads that share a key head: `rows = group · Tq`, row `g · Tq + i`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structattn.ops.call import DecodeCall
from structattn.ops.triton import launch, static, tiles
from structattn.ops.triton.tiles import LOG2E

# (BLOCK_K, warps, stages) by the wider of r and dv, doubled for float32, as for attention.
BLOCKS = {64: (128, 4, 3), 128: (128, 4, 2), 256: (64, 8, 2), 1024: (32, 8, 1)}
# Dimensions per product at most, by the bytes of a number: wider ones do not fit in registers.
PIECE = {2: 64, 4: 32}
# Programs per multiprocessor that hide the latency of memory, and the fewest tiles of keys worth a program.
PROGRAMS, LEAST_TILES = 4, 2


@triton.jit(do_not_specialize=["key_length", "level_starts", "share"])
def share_kernel(
    query, key_levels, value, key_start, shares, tops, totals,
    query_strides, level_strides, value_strides, level_starts,
    key_heads, rows, queries, key_length, share, splits, scale,
    RANKS: tl.constexpr, SIZES: tl.constexpr, GAINS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the share of keys `split · share` and on: weighted values, maximum and sum, in units of log 2."""
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    row_tiles = (rows + ROWS - 1) // ROWS
    pair, row = tile // row_tiles, tile % row_tiles * ROWS + tl.arange(0, ROWS)
    batch, key_head = pair // key_heads, pair % key_heads
    start = 0
    if key_start is not None:
        start = tl.load(key_start + batch).to(tl.int32)
    stop = tl.minimum((split + 1) * share, key_length)
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
    value_rows, value_step = tiles.rows_of(value, value_strides, batch, key_head, 0)

    result = tl.zeros((ROWS, static.padded(WIDTH)), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(tl.maximum(split * share, start), stop, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        score = tl.zeros((ROWS, BLOCK_K), tl.float32)
        gain = tl.full((ROWS, BLOCK_K), GAINS[0], tl.float32)
        for level in tl.static_range(len(RANKS)):
            # No row shares this level with a key before the block of the earliest query.
            edge = start + earliest // SIZES[level] * SIZES[level]
            if first + BLOCK_K > edge:
                rows_at = key_levels[level] + batch.to(tl.int64) * level_strides[3 * level]
                rows_at += key_head.to(tl.int64) * level_strides[3 * level + 1] - level_starts[level]
                keys = load_keys(rows_at, level_strides[3 * level + 2], j, edge, stop, static.item(RANKS, level))
                if not static.is_resident(RANKS):
                    own_level = load_level(query + at, valid, level, RANKS, static.item(RANKS, level))
                else:
                    own_level = own[level]
                same = (position // SIZES[level])[:, None] == ((j - start) // SIZES[level])[None, :]
                score += tl.where(same, tl.dot(own_level, keys, input_precision=PRECISION), 0.0)
                gain = tl.where(same, GAINS[level], gain)
        visible = valid[:, None] & ((j < stop)[None, :] & ((j - start)[None, :] <= position[:, None]))
        score = tl.where(visible, score * gain * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        probability, decay = tl.exp2(score - base[:, None]), tl.exp2(top - base)
        total = total * decay + tl.sum(probability, 1)
        values = tiles.load_values((value_rows, value_step, first, first, stop), BLOCK_K, WIDTH, True)
        result = tl.dot(probability.to(values.dtype), values, result * decay[:, None], input_precision=PRECISION)
        top = new_top

    to = (pair.to(tl.int64) * splits + split) * rows + row
    columns = tl.arange(0, static.padded(WIDTH))
    inside = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(shares + to[:, None] * WIDTH + columns[None, :], result, mask=inside)
    tl.store(tops + to, top, mask=row < rows)
    tl.store(totals + to, total, mask=row < rows)


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
    (batch, heads, queries, _), (_, key_heads, _, width) = call.query.shape, call.value_levels[0].shape
    out = call.query.new_empty(batch, heads, queries, width)
    if not out.numel():
        return out
    query, value = launch.unit_stride(call.query), launch.unit_stride(call.value_levels[0])
    pieces = pieces_of(hierarchy.ranks, PIECE[query.dtype.itemsize])
    levels = [launch.unit_stride(call.key_levels[level][..., low:high, :]) for level, low, high in pieces]
    block, warps, stages = BLOCKS[launch.width_class(hierarchy.rank, width, query.dtype)]
    rows, pairs = heads // key_heads * queries, batch * key_heads
    tile = min(static.padded(rows), 64)
    row_tiles = triton.cdiv(rows, tile)
    share = keys_per_program(key_length, pairs * row_tiles, query, block)
    splits = triton.cdiv(key_length, share)
    shares = torch.empty(pairs, splits, rows, width, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, pairs, splits, rows, dtype=torch.float32, device=query.device)
    with launch.on_device(query):
        share_kernel[(pairs * row_tiles * splits,)](
            query, tuple(levels), value, call.key_start, shares, tops, totals,
            query.stride(), tuple(stride for keys in levels for stride in keys.stride()[:3]), value.stride(),
            tuple(call.level_starts[level] for level, _, _ in pieces), key_heads, rows, queries, key_length, share,
            splits, call.scale, RANKS=tuple(high - low for _, low, high in pieces),
            SIZES=tuple(launch.sizes(hierarchy)[level] for level, _, _ in pieces),
            GAINS=tuple(hierarchy.gains[level] for level, _, _ in pieces), WIDTH=width,
            PRECISION=launch.precision(), ROWS=tile, BLOCK_K=block, num_warps=warps, num_stages=stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        join_kernel[(pairs * rows,)](
            shares, tops, totals, out, rows, splits, WIDTH=width, SPLITS=triton.next_power_of_2(splits),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def pieces_of(ranks: tuple[int, ...], widest: int) -> list[tuple[int, int, int]]:
    """Return `(level, first, stop)` of the dimensions of each product; a wide level takes several."""
    return [(level, low, min(low + widest, rank)) for level, rank in enumerate(ranks) for low in range(0, rank, widest)]


def keys_per_program(key_length: int, tasks: int, query: Tensor, block: int) -> int:
    """Return keys per program, in whole tiles, so that every multiprocessor is busy."""
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    key_tiles = triton.cdiv(key_length, block)
    splits = max(1, min(PROGRAMS * processors // tasks, key_tiles // LEAST_TILES))
    return int(triton.cdiv(key_tiles, splits)) * block
