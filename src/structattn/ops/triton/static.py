"""Numbers known when a kernel is compiled: how rows are cut into chunks, and which code each level needs.

Chunks and parts are explained in `structattn.ops.triton.tiles`.
"""

from __future__ import annotations

import triton

# Dimensions per chunk at most; rows wider than RESIDENT are not held, but loaded chunk by chunk for each product.
WIDEST, RESIDENT = 128, 256


@triton.constexpr_function
def prefix(ranks, depth):
    """Return the prefix rank R_depth."""
    return sum(ranks[:depth])


@triton.constexpr_function
def chunks_of(ranks, step):
    """Return `(first dimension, width)` of each chunk."""
    chunks, at = [], 0
    for depth in range(1, len(ranks) + 1):
        edge = -(-sum(ranks[:depth]) // step) * step
        while at < edge:
            width = 16
            while at + 2 * width <= edge and width < WIDEST:
                width *= 2
            chunks.append((at, width))
            at += width
    return chunks


@triton.constexpr_function
def chunk_count(ranks, step):
    """Return the number of chunks that cover all of r."""
    return len(chunks_of(ranks, step))


@triton.constexpr_function
def chunk_start(ranks, step, chunk):
    """Return the first dimension of a chunk."""
    return chunks_of(ranks, step)[chunk][0]


@triton.constexpr_function
def chunk_width(ranks, step, chunk):
    """Return the number of dimensions of a chunk, a power of two."""
    return chunks_of(ranks, step)[chunk][1]


@triton.constexpr_function
def overlaps(ranks, step, chunk, start, stop):
    """Return True if a chunk holds any of the dimensions `start … stop`."""
    first, width = chunks_of(ranks, step)[chunk]
    return first < stop and start < first + width


@triton.constexpr_function
def within(ranks, step, chunk, start, stop):
    """Return True if all of a chunk lies in the dimensions `start … stop`."""
    first, width = chunks_of(ranks, step)[chunk]
    return start <= first and first + width <= stop


@triton.constexpr_function
def is_resident(ranks):
    """Return True if a tile's rows are narrow enough to be held."""
    return sum(ranks) <= RESIDENT


@triton.constexpr_function
def padded(width):
    """Return `width` rounded up to a power of two that products take."""
    return max(16, 1 << (width - 1).bit_length())


@triton.constexpr_function
def parts_of(ranks, step):
    """Return `(first, stop)` of the levels of each far part: those whose prefixes end at the same chunk's edge."""
    edges = [-(-sum(ranks[:depth]) // step) for depth in range(1, len(ranks) + 1)]
    starts = [level for level, edge in enumerate(edges) if level == 0 or edge != edges[level - 1]]
    return list(zip(starts, [*starts[1:], len(ranks)], strict=True))


@triton.constexpr_function
def item(values, index):
    """Return `values[index]` as a constant; before Triton 3.8 indexing would make it a run-time number."""
    return values[index]


@triton.constexpr_function
def part_count(ranks, step):
    """Return the number of parts, the near one included."""
    return len(parts_of(ranks, step)) + 1


@triton.constexpr_function
def is_near(part, ranks, step):
    """Return True if a part is the near one."""
    return part == len(parts_of(ranks, step))


@triton.constexpr_function
def part_start(part, ranks, step):
    """Return the first level of a part; the near part counts as the last level."""
    return [*parts_of(ranks, step), (len(ranks) - 1, len(ranks))][part][0]


@triton.constexpr_function
def part_stop(part, ranks, step):
    """Return one past the last level of a part."""
    return [*parts_of(ranks, step), (len(ranks) - 1, len(ranks))][part][1]


@triton.constexpr_function
def is_masked(part, ranks, step, even):
    """Return True if tiles of a part may be less than full."""
    return part == len(parts_of(ranks, step)) or not even


@triton.constexpr_function
def always_whole(sizes, own):
    """Return how many leading levels have blocks that hold any whole tile of `own` positions."""
    count = 0
    while count < len(sizes) and sizes[count] % own == 0:
        count += 1
    return count


@triton.constexpr_function
def differ(gains, first):
    """Return True if gains from index `first` on are not all equal."""
    return len(set(gains[first:])) > 1
