"""Choose level ranks and windows by head and context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from structattn import checks

PAPER_RANKS = (32, 8, 6, 4, 4, 4, 4, 2)
"""Level ranks of MLR attention for heads of 64 in a context of 1024 (language)."""
PAPER_BILINEAR_RANKS = (16, 8, 4, 4)
"""Level ranks of bilinear MLR for heads of 32 (in-context regression)."""
_SMALLEST_BLOCK = 8
_SMALLEST_WINDOW = 4
_LEVELS = 8


def paper_ranks(head_dim: int, context_length: int, levels: int | None = None) -> tuple[int, ...]:
    """Return the paper's ranks, scaled to a head and a context.

    The paper has `32|8|6|4|4|4|4|2` for heads of 64 in 1024 tokens. Prefix ranks keep their share of the head, so that
    a pair at a given depth keeps its share of the dot product. They are even where the head is even. Levels of rank 0
    are dropped. There are `levels` levels, or as many as leave the smallest block 8 tokens; the last one gets the ranks
    of all deeper levels.

    Args:
        head_dim: `r`.
        context_length: tokens.
        levels: number of levels.

    Raises:
        ValueError: the split of this head has fewer than `levels` levels.
    """
    checks.positive_int("head_dim", head_dim)
    fitting = max(1, (checks.positive_int("context_length", context_length) // _SMALLEST_BLOCK).bit_length())
    ranks = proportional_ranks(head_dim, PAPER_RANKS, levels or fitting)
    if levels is not None and len(ranks) < levels:
        raise ValueError(f"levels must be at most {len(ranks)} for heads of {head_dim}, got {levels}; or give ranks")
    return ranks


def default_ranks(head_dim: int, context_length: int, levels: int | None = None) -> tuple[int, ...]:
    """Return the default ranks of MLR attention: eight equal levels.

    Where the context has room for fewer levels, the last one gets the rest of the head. Ranks are even where the head
    is even, so that a rotary embedding fits; what does not divide is spread. A head of fewer than eight pairs has a
    pair for each level.

    Args:
        head_dim: `r`.
        context_length: tokens. It sets the number of levels: the last of `default_windows` has at least 4 tokens.
        levels: number of levels in place of that; more than eight are equal parts of the head.

    Raises:
        ValueError: the head has fewer dimensions, or pairs of dimensions, than `levels`.
    """
    unit = 1 if checks.positive_int("head_dim", head_dim) % 2 else 2
    parts = head_dim // unit
    if levels is None:
        fitting = (checks.positive_int("context_length", context_length) // _SMALLEST_WINDOW).bit_length()
        levels = max(1, min(fitting, _LEVELS, parts))
    if checks.positive_int("levels", levels) > parts:
        raise ValueError(f"levels must be at most {parts} for heads of {head_dim}, got {levels}; or give ranks")
    parts = min(max(levels, _LEVELS), parts)
    edges = [head_dim // unit * part // parts for part in range(levels)]
    return tuple(unit * (stop - start) for start, stop in itertools.pairwise([*edges, head_dim // unit]))


def default_windows(levels: int, context_length: int) -> tuple[int | None, ...]:
    """Return the default windows: all, half of the context, a quarter, ….

    Where the context is too short to be halved so often, windows shrink by single tokens, down to one.
    """
    checks.positive_int("context_length", context_length)
    windows: list[int] = []
    for after in reversed(range(checks.positive_int("levels", levels) - 1)):
        half = context_length >> len(windows) + 1
        windows.append(max(after + 1, min(half, windows[-1] - 1) if windows else half))
    return (None, *windows)


def proportional_ranks(rank: int, proportions: Sequence[int], levels: int) -> tuple[int, ...]:
    """Split `rank` into at most `levels` parts.

    Their running sums are nearest to those of `proportions`.
    """
    unit = 1 if rank % 2 else 2
    total, count = sum(proportions), rank // unit
    edges = [0, *((2 * count * prefix + total) // (2 * total) for prefix in itertools.accumulate(proportions))]
    ranks = [unit * (stop - start) for start, stop in itertools.pairwise(edges) if stop > start]
    return (*ranks[: levels - 1], sum(ranks[levels - 1 :])) if len(ranks) > levels else tuple(ranks)
