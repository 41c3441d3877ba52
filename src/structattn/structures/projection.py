"""The nearest sum of levels to a dense matrix, in Frobenius norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.structures.contraction import Level, dense_level, factors_from_tiles, level_tiles

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LevelsFit:
    """What a fit found.

    Attributes:
        factors: `(left, right)` of each level, `left (H, p·b, a, c·s)` and `right (H, p·c, d, b·s)`.
        errors: Relative error `‖target - fit‖ / ‖target‖` of each head after each sweep, `(sweeps, H)`.
    """

    factors: tuple[Factors, ...]
    errors: Tensor


def truncated_svd(matrices: Tensor, rank: int) -> Factors:
    """`U, V` with `U Vᵀ` the nearest matrix of rank `rank` to each of `matrices (..., m, n)` (Eckart and Young).

    The singular values are split evenly between the two. Columns past `min(m, n)` are zero.
    """
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = sigma[..., None, :rank].sqrt()
    pad = (0, max(0, rank - sigma.shape[-1]))
    left, right = u[..., :rank] * root, vh[..., :rank, :].transpose(-1, -2) * root
    return torch.nn.functional.pad(left, pad), torch.nn.functional.pad(right, pad)


def nearest_level(target: Tensor, level: Level) -> Factors:
    """Factors of the one level nearest to `target (H, dim_out, dim_in)`: the optimum.

    Frobenius error splits over the tiles of the level and what lies outside its diagonal blocks, and no two
    tiles share a number, so the optimum is the truncated SVD of every tile.
    """
    left, right = factors_from_tiles(*truncated_svd(level_tiles(target, level), level.s), level)
    return left, right / level.weight


def nearest_levels(target: Tensor, levels: Sequence[Level], max_sweeps: int = 200) -> LevelsFit:
    """A sum of levels near `target (H, dim_out, dim_in)`, by block-coordinate descent over the levels."""
    parts = [torch.zeros_like(target) for _ in levels]
    factors: list[Factors] = []
    errors = []
    for _ in range(1 if len(levels) == 1 else max_sweeps):
        residual = target - torch.stack(parts).sum(0)
        factors = []
        for index, level in enumerate(levels):
            left, right = nearest_level(residual + parts[index], level)
            part = level.weight * dense_level(left, right, level)
            residual = residual + parts[index] - part
            parts[index] = part
            factors.append((left, right))
        errors.append(torch.linalg.matrix_norm(residual) / torch.linalg.matrix_norm(target))
    return LevelsFit(tuple(factors), torch.stack(errors))
