"""Cut rows into chunks when a kernel is compiled, see `structattn.ops.triton.tiles`.

`widths` are the dimensions that each level owns, of queries and keys (`ranks`) or of values (`values`).
"""

from __future__ import annotations

import triton

# Dimensions per chunk at most; rows wider than RESIDENT are not held, but loaded chunk by chunk for each product.
WIDEST, RESIDENT = 128, 256


@triton.constexpr_function
def prefix(widths, depth):
    """Return the width of the first `depth` levels; for ranks, `R_depth`."""
    return sum(widths[:depth])


@triton.constexpr_function
def value_step(values, step):
    """Return values' chunk step, 0 (one chunk) where level 1 owns all."""
    return step if any(values[1:]) else 0


@triton.constexpr_function
def chunks_of(widths, step):
    """Return `(first dimension, width)` of each chunk; for step 0 there is one."""
    if step == 0:
        return [(0, max(16, 1 << (sum(widths) - 1).bit_length()))]
    chunks, at = [], 0
    for depth in range(1, len(widths) + 1):
        edge = -(-sum(widths[:depth]) // step) * step
        while at < edge:
            width = 16
            while at + 2 * width <= edge and width < WIDEST:
                width *= 2
            chunks.append((at, width))
            at += width
    return chunks


@triton.constexpr_function
def chunk_count(widths, step):
    """Return the number of chunks that cover all dimensions."""
    return len(chunks_of(widths, step))


@triton.constexpr_function
def chunk_start(widths, step, chunk):
    """Return the first dimension of a chunk."""
    return chunks_of(widths, step)[chunk][0]


@triton.constexpr_function
def chunk_width(widths, step, chunk):
    """Return the number of dimensions of a chunk, a power of two."""
    return chunks_of(widths, step)[chunk][1]


@triton.constexpr_function
def overlaps(widths, step, chunk, start, stop):
    """Return True if a chunk holds any of the dimensions `start … stop`."""
    first, width = chunks_of(widths, step)[chunk]
    return start < stop and first < stop and start < first + width


@triton.constexpr_function
def within(widths, step, chunk, start, stop):
    """Return True if all of a chunk lies in the dimensions `start … stop`."""
    first, width = chunks_of(widths, step)[chunk]
    return start <= first and first + width <= stop


@triton.constexpr_function
def all_chunks(widths, step):
    """Return the range of all chunks."""
    return (0, len(chunks_of(widths, step)))


@triton.constexpr_function
def is_resident(ranks):
    """Return True if a tile's rows are narrow enough to be held."""
    return sum(ranks) <= RESIDENT


@triton.constexpr_function
def padded(width):
    """Return `width` rounded up to a power of two that products take."""
    return max(16, 1 << (width - 1).bit_length())


@triton.constexpr_function
def item(values, index):
    """Return `values[index]` as a constant, which Triton before 3.8 would not."""
    return values[index]


@triton.constexpr_function
def differ(gains, first, stop):
    """Return True if the gains `first … stop` are not all equal."""
    return len(set(gains[first:stop])) > 1
