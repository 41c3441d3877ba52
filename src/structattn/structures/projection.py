"""Find the sum of levels nearest to a matrix in Frobenius norm.

One level has a closed form. Several are fitted by block-coordinate descent: each step sets one level to its optimum for
the residual of the others, so the error cannot rise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.structures.contraction import Level, dense_level, factors_from_tiles, level_tiles
from structattn.structures.peeling import peel, truncated_svd

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LevelsFit:
    """Result of :func:`nearest_levels`.

    Attributes:
        factors: `(left, right)` of each level, `left (p·b, a, c·s)` and `right (p·c, d, b·s)`.
        errors: Relative error `‖target - fit‖ / ‖target‖` after each sweep; never rises.
    """

    factors: tuple[Factors, ...]
    errors: tuple[float, ...]


def nearest_level(target: Tensor, level: Level) -> Factors:
    """Return the level's factors nearest to each `target (H, dim_out, dim_in)`.

    The squared error is a sum over the level's tiles (and a constant outside its diagonal blocks), and no two tiles
    share a number, so the optimum is the truncated SVD of every tile.
    """
    left, right = factors_from_tiles(*truncated_svd(level_tiles(target, level), level.s), level)
    return left, right / level.weight


def nearest_levels(
    target: Tensor, levels: Sequence[Level], *, max_sweeps: int = 300, tolerance: float = 1e-8
) -> LevelsFit:
    """Return a sum of levels near `target (dim_out, dim_in)`.

    For one level this is the optimum. For several the problem is not convex. A few starts each take sweeps of
    block-coordinate descent with extrapolation between them (undone where it does not lower the error), and the best
    end is kept. Nested block-diagonal levels (MLR) start from the algebraic :func:`peel`, which recovers almost every
    member whose ranks fit its blocks, and from the coarsest level fitted alone. Other sums of levels start from each
    level fitted alone.

    Args:
        target: The matrix, float64 for the stated accuracy.
        levels: Shapes of the levels.
        max_sweeps: Most sweeps from each start.
        tolerance: A start is left when its relative error is at most this, or a sweep lowers it by no more.

    Returns:
        The fit; `errors` are those of the start that was kept.
    """
    if len(levels) == 1:
        max_sweeps = 1
    fits: list[LevelsFit] = []
    for start in _starts(target, levels):
        fits.append(_descend(target, start, levels, max_sweeps, tolerance))
        if fits[-1].errors[-1] <= tolerance:
            break
    return min(fits, key=lambda fit: fit.errors[-1])


def _starts(target: Tensor, levels: Sequence[Level]) -> Iterator[list[Tensor]]:
    """Yield the starting points: values of the levels, as matrices."""
    nested = _are_nested_blocks(levels)
    if nested and len(levels) > 1:
        yield peel(target, levels)
    for first in range(1 if nested else len(levels)):
        start = [torch.zeros_like(target) for _ in levels]
        if first > 0:  # a sweep begins with the first level, so that one fits itself
            start[first] = _fitted(target, levels[first])[0]
        yield start


def _are_nested_blocks(levels: Sequence[Level]) -> bool:
    """Return True if the levels are those of MLR, coarse to fine."""
    return all(level.b == level.c == 1 for level in levels) and all(
        fine.blocks > coarse.blocks and fine.blocks % coarse.blocks == 0 for coarse, fine in itertools.pairwise(levels)
    )


def _descend(
    target: Tensor, parts: list[Tensor], levels: Sequence[Level], max_sweeps: int, tolerance: float
) -> LevelsFit:
    """Sweep from the levels `parts`, extrapolating as Nesterov does, with restarts."""
    norm = max(torch.linalg.matrix_norm(target).item(), torch.finfo(target.dtype).tiny)
    before, momentum = parts, 0
    factors: tuple[Factors, ...] = ()
    errors: list[float] = []
    while len(errors) < max_sweeps:
        step = momentum / (momentum + 3)
        ahead = [new + step * (new - old) for new, old in zip(parts, before, strict=True)]
        swept, found, error = _sweep(target, ahead, levels)
        if errors and error > errors[-1] * norm and momentum > 0:
            momentum = 0
            continue
        if errors and error > errors[-1] * norm:  # rounding: there is nothing left to gain
            break
        before, parts, factors = parts, swept, found
        errors.append(error / norm)
        momentum += 1
        if errors[-1] <= tolerance or (len(errors) > 1 and errors[-2] - errors[-1] <= tolerance):
            break
    return LevelsFit(factors, tuple(errors))


def _sweep(
    target: Tensor, parts: Sequence[Tensor], levels: Sequence[Level]
) -> tuple[list[Tensor], tuple[Factors, ...], float]:
    """Set each level to its optimum; return levels, factors and error."""
    residual = target - torch.stack(tuple(parts)).sum(0)
    swept, factors = [], []
    for part, level in zip(parts, levels, strict=True):
        residual = residual + part
        fitted, pair = _fitted(residual, level)
        residual = residual - fitted
        swept.append(fitted)
        factors.append(pair)
    return swept, tuple(factors), torch.linalg.matrix_norm(residual).item()


def _fitted(target: Tensor, level: Level) -> tuple[Tensor, Factors]:
    """Return the level nearest to `target (dim_out, dim_in)`, as matrix and factors."""
    left, right = nearest_level(target[None], level)
    return level.weight * dense_level(left, right, level)[0], (left[0], right[0])
