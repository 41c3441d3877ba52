"""Parts of the other side that share code, known when a kernel is compiled; see `structattn.ops.triton.tiles`."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import triton

from structattn.ops.triton import static

# The size of a block or window that is the whole sequence: longer than any, and a multiple of every tile.
WHOLE = 2**30


class Part(NamedTuple):
    """Positions of the other side that share code."""

    far: bool
    """True if both tiles lie whole in each level's prefix: `level` runs through `first … stop`, and one is taken."""
    first: int
    stop: int
    whole: int
    """Not far: leading levels that all pairs share. A finite window may leave none."""
    partial: int
    """Not far: levels from `whole` to here reach some pairs."""
    own: bool
    """True if the part holds the own tile's positions, and so is one run: there the causal mask cuts."""
    starts: tuple[int, ...]
    """By window, starts and stops of the run before the own tile, counted from it, for each level `first … stop`."""
    stops: tuple[int, ...]
    masked: bool
    """True if tiles of the other side may be less than full."""


@triton.constexpr_function
def parts_of(ranks, values, sizes, by_window, causal, own, other, step, even):
    """Return the parts of tiles of `own` positions against tiles of `other` ones, as plain tuples.

    They go from far to near: a later part uses all chunks of values that an earlier one does.
    """
    edges = _edges(ranks, values, step)
    if by_window:
        zones, bands = _window_runs(sizes, causal, own, other)
    else:
        zones = {level: (0, 0) for level in range(len(sizes))}
        last, whole = len(sizes) - 1, _always_whole(sizes, own)
        bands = [Part(False, last, last + 1, whole, last + 1, True, (0,), (0,), True)]
    parts = [band._replace(masked=not even or (band.own and (causal or not by_window))) for band in bands]
    for _, levels in itertools.groupby(sorted(zones), key=lambda level: edges[level]):
        first, *more = levels
        levels = range(first, [first, *more][-1] + 1)
        runs = [zones.get(level, (0, 0)) for level in levels]
        starts, stops = zip(*runs, strict=True)
        parts.append(Part(True, levels.start, levels.stop, 0, levels.stop, False, starts, stops, not even))
    return tuple(tuple(part) for part in sorted(parts, key=lambda part: (part.own, part.partial)))


@triton.constexpr_function
def _edges(ranks, values, step):
    """Return the last chunks of r and of values that each level needs; levels of equal ones share a far part."""
    values_at = static.value_step(values, step) or 2 * sum(values)
    return [
        (-(-sum(ranks[:depth]) // step), -(-sum(values[:depth]) // values_at)) for depth in range(1, len(ranks) + 1)
    ]


@triton.constexpr_function
def _always_whole(sizes, own):
    """Return how many leading levels have blocks that hold any whole tile of `own` positions."""
    return len(list(itertools.takewhile(lambda size: size % own == 0, sizes)))


@triton.constexpr_function
def _window_runs(sizes, causal, own, other):
    """Return the far run of each level that has one, before the own tile, and the other parts, in order.

    Positions count from the own tile, and runs consist of whole tiles. A window's edge cuts a *band* of pairs.
    """
    bands: list[Part] = []
    for level, size in enumerate(sizes):
        if size < WHOLE:
            start, stop = (1 - size) // other * other, -((size - own) // other) * other
            if bands and bands[-1].stops[0] > start:  # there is no tile between the edges of two windows
                bands[-1] = bands[-1]._replace(partial=level + 1, stops=(stop,))
            else:
                bands.append(Part(False, level, level + 1, level, level + 1, False, (start,), (stop,), False))
    zones: dict[int, tuple[int, int]] = {}
    at, depth = -WHOLE, int(sizes[0] == WHOLE)
    for band in bands:
        if depth and at < band.starts[0]:
            zones[depth - 1] = (at, band.starts[0])
        at, depth = band.stops[0], band.partial
    last = len(sizes) - 1
    if at > 0:
        at, whole = bands[-1].starts[0], bands.pop().whole
    else:
        whole = len(sizes)
        if causal:
            if at < 0:
                zones[last] = (at, 0)
            at = 0
    bands.append(Part(False, last, last + 1, whole, len(sizes), True, (at,), (own - at,), False))
    return zones, bands


@triton.constexpr_function
def part_count(parts):
    """Return the number of parts."""
    return len(parts)


@triton.constexpr_function
def is_far(parts, part):
    """Return True if a part is far."""
    return Part(*parts[part]).far


@triton.constexpr_function
def part_start(parts, part):
    """Return the first level that a part goes through; one that is not far goes through one."""
    return Part(*parts[part]).first


@triton.constexpr_function
def part_stop(parts, part):
    """Return one past the last level that a part goes through."""
    chosen = Part(*parts[part])
    return chosen.stop if chosen.far else chosen.first + 1


@triton.constexpr_function
def whole_levels(parts, part):
    """Return how many leading levels all visible pairs of a part share: those that level 1 leaves out are invisible."""
    return max(Part(*parts[part]).whole, 1)


@triton.constexpr_function
def partial_levels(parts, part):
    """Return one past the last level that reaches some pair of a part."""
    return Part(*parts[part]).partial


@triton.constexpr_function
def holds_own(parts, part):
    """Return True if a part holds the own tile's positions."""
    return Part(*parts[part]).own


@triton.constexpr_function
def hides_far_pairs(parts, part):
    """Return True if a finite first window may hide pairs of a part."""
    chosen = Part(*parts[part])
    return not chosen.far and chosen.whole == 0


@triton.constexpr_function
def is_masked(parts, part):
    """Return True if tiles of a part may be less than full."""
    return Part(*parts[part]).masked


@triton.constexpr_function
def run_starts(parts, part):
    """Return, by window, the starts of a part's run before the own tile for each level it goes through."""
    return Part(*parts[part]).starts


@triton.constexpr_function
def run_stops(parts, part):
    """Return, by window, the stops of a part's run before the own tile for each level it goes through."""
    return Part(*parts[part]).stops
