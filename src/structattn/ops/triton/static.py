"""Numbers that are known when a kernel is compiled: from ranks and steps, how rows are cut and which code is needed.

Chunks and parts are explained in `structattn.ops.triton.tiles`.
"""

from __future__ import annotations

import triton

# Dimensions per chunk at most; rows wider than RESIDENT are not held, but loaded chunk by chunk for each product.
WIDEST, RESIDENT = 128, 256


@triton.constexpr_function
def prefix(ranks, depth):
    """R_depth."""
    return sum(ranks[:depth])


@triton.constexpr_function
def chunks_of(ranks, step):
    """`(first dimension, width)` of each chunk."""
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
    """The number of chunks that cover all of r."""
    return len(chunks_of(ranks, step))


@triton.constexpr_function
def chunk_start(ranks, step, chunk):
    """The first dimension of a chunk."""
    return chunks_of(ranks, step)[chunk][0]


@triton.constexpr_function
def chunk_width(ranks, step, chunk):
    """The number of dimensions of a chunk, a power of two."""
    return chunks_of(ranks, step)[chunk][1]


@triton.constexpr_function
def overlaps(ranks, step, chunk, start, stop):
    """Whether a chunk holds any of the dimensions `start … stop`."""
    first, width = chunks_of(ranks, step)[chunk]
    return first < stop and start < first + width


@triton.constexpr_function
def within(ranks, step, chunk, start, stop):
    """Whether all of a chunk lies in the dimensions `start … stop`."""
    first, width = chunks_of(ranks, step)[chunk]
    return start <= first and first + width <= stop


@triton.constexpr_function
def is_resident(ranks):
    """Whether a tile's rows are narrow enough to be held."""
    return sum(ranks) <= RESIDENT


@triton.constexpr_function
def padded(width):
    """`width` rounded up to a power of two that products take."""
    return max(16, 1 << (width - 1).bit_length())


@triton.constexpr_function
def parts_of(ranks, step):
    """`(first, stop)` of the levels of each far part: those whose prefixes end at the same chunk's edge."""
    edges = [-(-sum(ranks[:depth]) // step) for depth in range(1, len(ranks) + 1)]
    starts = [level for level, edge in enumerate(edges) if level == 0 or edge != edges[level - 1]]
    return list(zip(starts, [*starts[1:], len(ranks)], strict=True))


@triton.constexpr_function
def item(values, index):
    """`values[index]`, still known when the kernel is compiled: before Triton 3.8 an index makes it a number."""
    return values[index]


@triton.constexpr_function
def part_count(ranks, step):
    """The number of parts, the near one included."""
    return len(parts_of(ranks, step)) + 1


@triton.constexpr_function
def is_near(part, ranks, step):
    """Whether a part is the near one."""
    return part == len(parts_of(ranks, step))


@triton.constexpr_function
def part_start(part, ranks, step):
    """The first level of a part; the near part is gone through once, as if for the last level."""
    return [*parts_of(ranks, step), (len(ranks) - 1, len(ranks))][part][0]


@triton.constexpr_function
def part_stop(part, ranks, step):
    """One past the last level of a part."""
    return [*parts_of(ranks, step), (len(ranks) - 1, len(ranks))][part][1]


@triton.constexpr_function
def is_masked(part, ranks, step, even):
    """Whether tiles of a part may be less than full."""
    return part == len(parts_of(ranks, step)) or not even


@triton.constexpr_function
def always_whole(sizes, own):
    """How many leading levels have blocks that hold any whole tile of `own` positions."""
    count = 0
    while count < len(sizes) and sizes[count] % own == 0:
        count += 1
    return count


@triton.constexpr_function
def differ(gains, first):
    """Whether gains from index `first` on are not all one number."""
    return len(set(gains[first:])) > 1
