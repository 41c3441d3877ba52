"""Check the parts of a hierarchy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from structattn import checks
from structattn.ops.hierarchy_text import Sizes


def checked_ranks(ranks: Iterable[int]) -> tuple[int, ...]:
    """Return ranks of at least 1 as a tuple."""
    values = _sequence("ranks", ranks)
    if not values:
        raise ValueError("ranks must name at least one level, got none")
    return tuple(checks.positive_int(f"ranks[{level}]", rank) for level, rank in enumerate(values))


def checked_value_ranks(value_ranks: Iterable[int] | None, levels: int) -> tuple[int, ...] | None:
    """Return value ranks, one per level and not all 0; keep None."""
    if value_ranks is None:
        return None
    values = _per_level("value_ranks", value_ranks, levels)
    ranks = tuple(_rank_or_zero(f"value_ranks[{level}]", rank) for level, rank in enumerate(values))
    if not any(ranks):
        raise ValueError(f"value_ranks must sum to the width of the values, got {ranks}")
    return ranks


def checked_reach(
    block_sizes: Iterable[int | None] | None, windows: Iterable[int | None] | None, levels: int
) -> tuple[Sizes | None, Sizes | None]:
    """Return block sizes and windows, of which one is None.

    One level that sees everything has block sizes, however it was given.
    """
    if block_sizes is not None and windows is not None:
        raise ValueError(f"give block_sizes or windows, not both; got {block_sizes} and {windows}")
    if windows is not None:
        sizes = _checked_windows(windows, levels)
        return ((None,), None) if sizes == (None,) else (None, sizes)
    if block_sizes is None and levels > 1:
        raise ValueError(f"{levels} levels need block_sizes or windows, got neither")
    return _checked_block_sizes((None,) if block_sizes is None else block_sizes, levels), None


def checked_sinks(sinks: int, windows: Sizes | None) -> int:
    """Return sinks of at least 0, below the smallest window."""
    count = _rank_or_zero("sinks", sinks)
    if count and windows is None:
        raise ValueError(f"sinks need levels by window, of which one is finite, got sinks = {count} without")
    smallest = windows[-1] if windows is not None else None
    if smallest is not None and count >= smallest:
        raise ValueError(f"sinks must be below the smallest window {smallest}, got {count}")
    return count


def checked_gains(gains: Iterable[float] | str | None, levels: int) -> tuple[float, ...]:
    """Return the gain of each depth."""
    if gains is None:
        return (1.0,) * levels
    if gains == "mean":
        return mean_gains(levels)
    if isinstance(gains, str):
        raise ValueError(f"gains must be 'mean', None or {levels} numbers, got {gains!r}")
    return tuple(
        checks.finite(f"gains[{level}]", gain) for level, gain in enumerate(_per_level("gains", gains, levels))
    )


def mean_gains(levels: int) -> tuple[float, ...]:
    """Return `1/m` for each depth `m`."""
    return tuple(1.0 / depth for depth in range(1, levels + 1))


def _checked_block_sizes(block_sizes: Iterable[int | None], levels: int) -> Sizes:
    values = _per_level("block_sizes", block_sizes, levels)
    if values[0] is not None:
        raise ValueError(f"block_sizes[0] must be None, the global level, got {values[0]!r}")
    for level, size in enumerate(values[1:], start=1):
        checks.positive_int(f"block_sizes[{level}]", size)
        coarser = values[level - 1]
        if coarser is not None and (size >= coarser or coarser % size):
            raise ValueError(
                f"block_sizes must shrink and nest: block_sizes[{level}] = {size} must be a proper divisor of "
                f"block_sizes[{level - 1}] = {coarser}"
            )
    return values


def _checked_windows(windows: Iterable[int | None], levels: int) -> Sizes:
    values = _per_level("windows", windows, levels)
    for level, window in enumerate(values):
        if level == 0 and window is None:
            continue
        checks.positive_int(f"windows[{level}]", window)
        wider = values[level - 1] if level else None
        if wider is not None and window >= wider:
            raise ValueError(
                f"windows must shrink: windows[{level}] = {window} must be below windows[{level - 1}] = {wider}"
            )
    return values


def _rank_or_zero(name: str, value: object) -> int:
    return 0 if value == 0 and not isinstance(value, bool) else checks.positive_int(name, value)


def _per_level(name: str, value: object, levels: int) -> tuple[Any, ...]:
    values = tuple(_sequence(name, value))
    if len(values) != levels:
        raise ValueError(f"{name} must have one entry per level ({levels}), got {len(values)}: {values}")
    return values


def _sequence(name: str, value: object) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, got {value!r} ({type(value).__name__})")
    return tuple(value)
