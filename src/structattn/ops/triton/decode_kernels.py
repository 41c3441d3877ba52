"""Decode: attend with a few queries to a long cache.

Keys and values come level by level, keys dimension-major. Keys are split over programs, each of which writes its share
of the softmax; a second kernel joins the shares.

A *row* is a query of one of the query heads that share a key head: `rows = group · Tq`, row `g · Tq + i`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structattn.ops.call import DecodeCall
from structattn.ops.triton import decode_tiles, launch, static
from structattn.ops.triton.tiles import LOG2E

# Dimensions per product at most, by the bytes of a number: wider ones do not fit in registers.
PIECE = {2: 64, 4: 32}
# Bytes of keys and values that a step of a loop loads, and stages of its pipeline. `STAGES - 1` steps are in flight:
# 48 KiB of shared memory, so that four programs fit on a multiprocessor.
STEP_BYTES, STAGES = 16384, 4
FEWEST_KEYS, MOST_KEYS = 32, 256
# Programs per multiprocessor that hide the latency of memory, and the fewest tiles of keys worth a program.
PROGRAMS, LEAST_TILES = 4, 4
# The second kernel holds the shares of all splits of a row in registers.
MOST_SPLITS = 128
# A run of one depth gets a loop of its own where it may hold at least this many tiles.
LEAST_RUN = 8


@triton.jit(do_not_specialize=["key_length", "first_tile", "share", "splits"])
def share_kernel(
    query, key_levels, value_levels, key_start, shares, tops, totals,
    query_strides, level_strides, value_strides, level_starts, value_starts,
    key_heads, rows, queries, key_length, first_tile, share, splits, scale,
    RANKS: tl.constexpr, SIZES: tl.constexpr, GAINS: tl.constexpr, VALUES: tl.constexpr, VALUE_SIZES: tl.constexpr,
    BY_WINDOW: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Write the share of `share` tiles of keys.

    A share is mixed values, maximum and sum, in units of log 2. Runs of tiles at one depth come first, without masks,
    then all other tiles. `RUNS` are the keys and the stages of a step of each piece's run, see `steps_of`.
    """
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    row_tiles = (rows + ROWS - 1) // ROWS
    pair, row = tile // row_tiles, tile % row_tiles * ROWS + tl.arange(0, ROWS)
    batch, key_head = pair // key_heads, pair % key_heads
    start = 0
    if key_start is not None:
        start = tl.load(key_start + batch).to(tl.int32)
    low = tl.maximum(first_tile + split * share, start // BLOCK_K)
    high = tl.minimum(first_tile + (split + 1) * share, (key_length + BLOCK_K - 1) // BLOCK_K)
    latest = key_length - 1 - start
    earliest = latest + 1 - queries
    position = earliest + row % queries
    valid = (row < rows) & (position >= 0)

    head = key_head * (rows // queries) + row // queries
    query_rows = query + batch.to(tl.int64) * query_strides[0] + head.to(tl.int64) * query_strides[1]
    query_rows += (row % queries).to(tl.int64) * query_strides[2]
    own, key_rows, result, value_rows = (), (), (), ()
    for piece in tl.static_range(len(RANKS)):
        if static.is_resident(RANKS):
            own = own + (decode_tiles.load_queries(query_rows, valid, piece, RANKS),)
        keys = decode_tiles.keys_of(key_levels, level_strides, level_starts, batch, key_head, piece, ALIGNED)
        key_rows = key_rows + (keys,)
    for level in tl.static_range(len(VALUES)):
        result = result + (tl.zeros((ROWS, static.padded(static.item(VALUES, level))), tl.float32),)
        values = decode_tiles.values_of(value_levels, value_strides, value_starts, batch, key_head, level, ALIGNED)
        value_rows = value_rows + (values,)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    runs, others = (), tl.maximum(high - low, 0)
    for piece in tl.static_range(len(RANKS)):
        if static.item(RUNS, piece)[0] > 0:
            first, stop = decode_tiles.run_of(
                earliest, latest, start, low, high, piece, static.item(RUNS, piece)[0], SIZES, BY_WINDOW, BLOCK_K
            )
            runs, others = runs + ((first, stop),), others - (stop - first)
            result, top, total = decode_tiles.attend_run(
                own, query_rows, valid, key_rows, value_rows, result, top, total, first, stop, scale * LOG2E, piece,
                static.item(RUNS, piece)[0], static.item(RUNS, piece)[1], BLOCK_K, RANKS, SIZES, GAINS, VALUES,
                VALUE_SIZES, ROWS, PRECISION, ALIGNED,
            )  # fmt: skip
    result, top, total = decode_tiles.attend_others(
        own, query_rows, valid, key_rows, value_rows, result, top, total, low, others, runs, position,
        tl.maximum(earliest, 0), start, key_length, scale * LOG2E, STAGES, BLOCK_K, RANKS, SIZES, GAINS, VALUES,
        VALUE_SIZES, BY_WINDOW, ROWS, PRECISION, ALIGNED,
    )  # fmt: skip

    to = (pair.to(tl.int64) * splits + split) * rows + row
    for level in tl.static_range(len(VALUES)):
        columns = tl.arange(0, static.padded(static.item(VALUES, level)))
        inside = (row < rows)[:, None] & (columns < static.item(VALUES, level))[None, :]
        columns += static.prefix(VALUES, level)
        at = shares + to[:, None] * static.prefix(VALUES, len(VALUES)) + columns[None, :]
        tl.store(at, result[level], mask=inside)
    tl.store(tops + to, top, mask=row < rows)
    tl.store(totals + to, total, mask=row < rows)


@triton.jit
def join_kernel(shares, tops, totals, out, rows, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Join the shares of a row; write zeros if it sees nothing."""
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
    itemsize = query.dtype.itemsize
    pieces = pieces_of(hierarchy.ranks, PIECE[itemsize])
    owners = [level for level, values in enumerate(call.value_levels) if values.shape[3]]
    keys = [launch.unit_stride(call.key_levels[level][..., low:high, :]) for level, low, high in pieces]
    values = [launch.unit_stride(call.value_levels[level]) for level in owners]
    key_starts = [call.level_starts[level] for level, _, _ in pieces]
    value_starts = [call.level_starts[level] for level in owners]
    aligned_keys, aligned_values = aligned_views(keys, key_starts, 3), aligned_views(values, value_starts, 2)
    if aligned_keys and aligned_values:
        (keys, key_starts), (values, value_starts) = aligned_keys, aligned_values
    ranks, widths = tuple(high - low for _, low, high in pieces), tuple(each.shape[3] for each in values)
    piece_sizes, value_sizes = tuple(sizes[level] for level, _, _ in pieces), tuple(sizes[level] for level in owners)
    (block, stages), runs = steps_of(ranks, piece_sizes, widths, value_sizes, itemsize)
    rows, pairs = heads // key_heads * queries, batch * key_heads
    tile = min(static.padded(rows), 64)
    row_tiles = triton.cdiv(rows, tile)
    first_tile = max(key_length - queries - sizes[0] + 1, 0) // block if hierarchy.by_window else 0
    key_tiles = triton.cdiv(key_length, block) - first_tile
    share = tiles_per_program(key_tiles, pairs * row_tiles, query)
    splits = triton.cdiv(key_tiles, share)
    shares = torch.empty(pairs, splits, rows, width, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, pairs, splits, rows, dtype=torch.float32, device=query.device)
    with launch.on_device(query):
        share_kernel[(pairs * row_tiles * splits,)](
            query, tuple(keys), tuple(values), call.key_start, shares, tops, totals,
            query.stride(), row_strides(keys), row_strides(values), tuple(key_starts), tuple(value_starts),
            key_heads, rows, queries, key_length, first_tile, share, splits, call.scale,
            RANKS=ranks, SIZES=piece_sizes, GAINS=tuple(hierarchy.gains[level] for level, _, _ in pieces),
            VALUES=widths, VALUE_SIZES=value_sizes, BY_WINDOW=hierarchy.by_window, PRECISION=launch.precision(),
            ALIGNED=bool(aligned_keys and aligned_values), ROWS=tile, BLOCK_K=block,
            STAGES=stages, RUNS=runs, num_warps=4 if max(hierarchy.rank, width) <= 128 else 8, enable_fp_fusion=True,
        )  # fmt: skip
        join_kernel[(pairs * rows,)](
            shares, tops, totals, out, rows, splits, WIDTH=width, SPLITS=triton.next_power_of_2(splits),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def row_strides(tensors: list[Tensor]) -> tuple[int, ...]:
    """Return the strides of all axes but the last, tensor after tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def aligned_views(tensors: list[Tensor], starts: list[int], axis: int) -> tuple[list[Tensor], list[int]] | None:
    """Start buffers at indices divisible by 16; return them and the indices.

    A buffer then starts at the last such index before its own start. Triton compiles for the alignment of pointers and
    numbers in tuples, and would compile anew as keys are dropped.

    Args:
        tensors: keys or values `(B, Hkv, …)`, of levels or pieces.
        starts: index of the first entry of each.
        axis: axis of time.

    Returns:
        None unless such entries and all strides are multiples of 16 bytes. The buffers of a cache are, at any start.
    """
    views, firsts = [], []
    for tensor, start in zip(tensors, starts, strict=True):
        lead = start % 16
        offset = tensor.storage_offset() - lead * tensor.stride(axis)
        address = tensor.data_ptr() - lead * tensor.stride(axis) * tensor.itemsize
        if offset < 0 or address % 16 or any(stride * tensor.itemsize % 16 for stride in tensor.stride()[:3]):
            return None
        views.append(tensor.as_strided(tensor.shape, tensor.stride(), offset) if lead else tensor)
        firsts.append(start - lead)
    return views, firsts


def pieces_of(ranks: tuple[int, ...], widest: int) -> list[tuple[int, int, int]]:
    """Return `(level, first, stop)` of each product; wide levels take several."""
    return [(level, low, min(low + widest, rank)) for level, rank in enumerate(ranks) for low in range(0, rank, widest)]


def steps_of(
    ranks: tuple[int, ...],
    sizes: tuple[int, ...],
    values: tuple[int, ...],
    value_sizes: tuple[int, ...],
    itemsize: int,
) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Return keys and stages of a step.

    The first pair is that of steps over all levels; the others are those of each piece's run, `(0, 0)` where it has
    none.
    """
    smallest = _step(ranks, values, itemsize)
    runs = []
    for piece, (size, following) in enumerate(zip(sizes, (*sizes[1:], 0), strict=True)):
        mixed = tuple(width for width, reach in zip(values, value_sizes, strict=True) if reach >= size)
        is_run = size - following >= LEAST_RUN * smallest[0]
        runs.append(_step(ranks[: piece + 1], mixed, itemsize) if is_run else (0, 0))
    return smallest, tuple(runs)


def _step(ranks: tuple[int, ...], values: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return keys (a power of two) and pipeline stages of a step."""
    width = itemsize * sum(static.padded(each) for each in (*ranks, *values))
    keys = min(max(1 << max(STEP_BYTES // width, 1).bit_length() - 1, FEWEST_KEYS), MOST_KEYS)
    return keys, min(max((STAGES - 1) * STEP_BYTES // (keys * width) + 1, 1), STAGES)


def tiles_per_program(key_tiles: int, tasks: int, query: Tensor) -> int:
    """Return each program's tiles of keys, to keep every multiprocessor busy."""
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    splits = max(1, min(PROGRAMS * processors // tasks, key_tiles // LEAST_TILES, MOST_SPLITS))
    return int(triton.cdiv(key_tiles, splits))
