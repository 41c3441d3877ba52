"""Plan the parts of a tile's loops when a kernel is compiled.

A part is a set of positions of the other side that share code, see `structattn.ops.triton.tiles`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import triton

from structattn.ops.triton import static

WHOLE = 2**30
"""Size of a block or window that is the whole sequence: longer than any, and a multiple of every tile."""


class Part(NamedTuple):
    """Positions of the other side that share code. Levels count from 0.

    Triton 3.6 hands named tuples on as plain ones, so functions make them anew.
    """

    first: int
    """First level whose positions these are. Parts that are not far have one."""
    stop: int
    """One past the last such level."""
    far: bool
    """True if the two tiles are at one depth: `first + 1 … stop`, known at run time."""
    whole: int = 0
    """Number of leading levels that reach all pairs, unless far. A finite first window may leave none."""
    partial: int = 0
    """One past the last level that reaches some pair."""
    own: bool = False
    """True if the own tile's positions are among these, which are then one run. There the causal mask cuts."""
    starts: tuple[int, ...] = (0,)
    """By window: where the run before the own tile starts, for each of the levels `first … stop`. The tile is at 0."""
    stops: tuple[int, ...] = (0,)
    """By window: where that run stops, likewise."""
    masked: bool = False
    """True if tiles of the other side may be less than full."""


@triton.constexpr_function
def parts_of(ranks, values, sizes, by_window, causal, own, other, step, even):
    """Return the parts of a kernel, as plain tuples.

    A program holds a tile of `own` positions and streams tiles of `other` ones. Parts go from far to near, so that a
    later part mixes all chunks of values that an earlier one mixes.
    """
    near = _near_by_block(sizes, own)
    runs = dict.fromkeys(range(len(sizes)), (0, 0))
    bands = []
    if by_window:
        bands = _bands(sizes, own, other)
        near = _near_by_window(bands[-1:], sizes, causal, own)
        bands = [band for band in bands if band.stops[0] <= 0]
        runs = _far_runs(bands, near, sizes)
    found = [band._replace(masked=not even) for band in bands]
    found.append(near._replace(masked=not even or causal or not by_window))
    edges = _edges(ranks, values, step)
    for _, group in itertools.groupby(sorted(runs), key=lambda level: edges[level]):
        levels = list(group)
        first, stop = levels[0], levels[-1] + 1
        starts, stops = zip(*(runs.get(level, (0, 0)) for level in range(first, stop)), strict=True)
        found.append(Part(first, stop, True, partial=stop, starts=starts, stops=stops, masked=not even))
    return tuple(tuple(part) for part in sorted(found, key=lambda part: (part.own, part.partial)))


@triton.constexpr_function
def _edges(ranks, values, step):
    """Return the chunk edges where each level's prefixes end.

    They are those of r and of values. Far levels with equal edges share a part.
    """
    at_values = static.value_step(values, step) or 2 * sum(values)
    return [
        (-(-sum(ranks[:depth]) // step), -(-sum(values[:depth]) // at_values)) for depth in range(1, len(ranks) + 1)
    ]


@triton.constexpr_function
def _near_by_block(sizes, own):
    """Return the near part; levels finer than its tile are partial."""
    levels = len(sizes)
    whole = len(list(itertools.takewhile(lambda size: size % own == 0, sizes)))
    return Part(levels - 1, levels, False, whole, levels, True)


@triton.constexpr_function
def _bands(sizes, own, other):
    """Return a part for the edge of each finite window.

    Edges that lie closer together than a tile share one. Runs begin and end between tiles of `other` positions. Only
    the last band may reach into the own tile.
    """
    bands = []
    for level, size in enumerate(sizes):
        if size < WHOLE:
            start, stop = (1 - size) // other * other, -((size - own) // other) * other
            if bands and bands[-1].stops[0] > start:
                bands[-1] = bands[-1]._replace(partial=level + 1, stops=(stop,))
            else:
                bands.append(Part(level, level + 1, False, level, level + 1, starts=(start,), stops=(stop,)))
    return bands


@triton.constexpr_function
def _near_by_window(last, sizes, causal, own):
    """Return the near part, with the last band if that reaches it."""
    levels, whole, start = len(sizes), len(sizes), -WHOLE
    for each in last:
        band = Part(*each)
        whole, start = (band.whole, band.starts[0]) if band.stops[0] > 0 else (levels, band.stops[0])
    if causal and whole == levels:
        start = 0  # a far run lies before
    return Part(levels - 1, levels, False, whole, levels, True, (start,), (own - start,))


@triton.constexpr_function
def _far_runs(bands, near, sizes):
    """Return `{level: (start, stop)}` of the far runs before the own tile."""
    at, depth, runs = -WHOLE, len([size for size in sizes if size == WHOLE]), {}
    for each in [*bands, near]:
        part = Part(*each)
        if depth and at < part.starts[0]:
            runs[depth - 1] = (at, part.starts[0])
        at, depth = part.stops[0], part.partial
    return runs


@triton.constexpr_function
def part_count(parts):
    """Return the number of parts."""
    return len(parts)


@triton.constexpr_function
def field(parts, part, name):
    """Return a field of a part, see `Part`."""
    return getattr(Part(*parts[part]), name)


@triton.constexpr_function
def whole_levels(parts, part):
    """Return the leading levels that all visible pairs share, at least 1."""
    return max(Part(*parts[part]).whole, 1)


@triton.constexpr_function
def hides_far_pairs(parts, part):
    """Return True if a finite first window may hide a part's pairs."""
    chosen = Part(*parts[part])
    return not chosen.far and chosen.whole == 0
