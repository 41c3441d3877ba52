"""Recover the levels of an MLR matrix by linear algebra alone.

Alternating over levels often stalls far from a matrix that is exactly MLR: at first the coarse level also fits what
belongs to the fine ones. But outside the diagonal blocks of the next level, the coarse level stands alone and can be
read off. Inside them it is then determined by the low rank that the remainder must have, that of the level below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.structures.contraction import Level, block_diagonal, diagonal_blocks


def truncated_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `U, V` whose `U Vᵀ` of rank `rank` is nearest to `matrices (..., m, n)`.

    It is the truncated SVD (Eckart and Young), its singular values split evenly. Columns past `min(m, n)` are zero.
    """
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = sigma[..., None, :rank].sqrt()
    left, right = u[..., :rank] * root, vh[..., :rank, :].mT * root
    missing = (0, max(0, rank - sigma.shape[-1]))
    return torch.nn.functional.pad(left, missing), torch.nn.functional.pad(right, missing)


def peel(target: Tensor, levels: Sequence[Level]) -> list[Tensor]:
    """Return nested levels, as matrices, with sum near `target (dim_out, dim_in)`.

    The sum is exact for almost every member whose ranks fit its blocks, see :func:`_grid_to_complete_on`. Otherwise, or
    with noise, it is a starting point.

    Args:
        target: The matrix.
        levels: Shapes with `b = c = 1` and block counts that increase, each a multiple of the one before.
    """
    parts = []
    rest = diagonal_blocks(target[None], levels[0].blocks)[0]  # (p, m, n): the blocks of this level
    for index, level in enumerate(levels):
        below = levels[index + 1 :]
        whole = rest
        if below:
            children = below[0].blocks // level.blocks
            whole = _complete(rest, children, level.s, *_grid_to_complete_on(level, below))
        left, right = truncated_svd(whole, level.s)
        part = left @ right.mT
        parts.append(block_diagonal(part[None])[0])
        if below:
            rest = diagonal_blocks(rest - part, children).flatten(0, 1)
    return parts


def _grid_to_complete_on(level: Level, below: Sequence[Level]) -> tuple[int, int]:
    """Return the tiles per side of a child, and their rank.

    A child is a diagonal block of the next level. Either its tiles are blocks of the level after next: off their
    diagonal, only the next level is left. Or one tile is the whole child, where the ranks of all levels below add up. A
    tile must have room for the rank of `level` and of what lies below. Where neither choice has room, the first makes a
    start.
    """
    children = below[0].blocks
    choices = [(1, sum(fine.blocks // children * fine.s for fine in below))]
    if len(below) > 1:
        choices.insert(0, (below[1].blocks // children, below[0].s))
    side = min(level.dim_out, level.dim_in) // children
    with_room = [(tiles, rank) for tiles, rank in choices if level.s + rank <= side // tiles]
    return (with_room or choices)[0]


def _complete(matrix: Tensor, children: int, rank: int, tiles: int, rank_below: int) -> Tensor:
    """Return low-rank matrices equal to `matrix (p, m, n)` off its diagonal blocks.

    There are `children` diagonal blocks. Inside child `t` it is `U_t X_t V_tᵀ`, where `U_t` and `V_t` span what the
    child's rows and columns hold outside of it, and `X_t` leaves rank `rank_below` on the child's `tiles x tiles` grid
    off its diagonal, or, with one tile, on the whole child.
    """
    inside = diagonal_blocks(matrix, children)  # (p, children, m', n')
    outside = matrix - block_diagonal(inside)
    count, rows, columns = inside.shape[0], inside.shape[-2], inside.shape[-1]
    row_strips = outside.reshape(count, children, rows, -1)
    column_strips = outside.reshape(count, -1, children, columns).transpose(1, 2)
    u = torch.linalg.svd(row_strips, full_matrices=False).U[..., :rank]
    v = torch.linalg.svd(column_strips, full_matrices=False).Vh[..., :rank, :].mT

    grid = inside.unflatten(-1, (tiles, -1)).unflatten(-3, (tiles, -1)).transpose(-2, -3)  # (.., i, j, m'', n'')
    u_tiles = u.unflatten(-2, (tiles, -1)).unsqueeze(-3)  # (.., i, 1, m'', rank)
    v_tiles = v.unflatten(-2, (tiles, -1)).unsqueeze(-4)  # (.., 1, j, n'', rank)
    x = _core_of_known_spaces(grid, u_tiles, v_tiles, rank_below)
    if tiles > 1:
        off_diagonal = 1.0 - torch.eye(tiles, dtype=x.dtype, device=x.device)
        x = (x * off_diagonal[:, :, None, None]).sum((-3, -4)) / off_diagonal.sum()
    else:
        x = x.squeeze(-3).squeeze(-3)
    return outside + block_diagonal(u @ x @ v.mT)


def _core_of_known_spaces(matrix: Tensor, u: Tensor, v: Tensor, rank: int) -> Tensor:
    """Return `X` such that `matrix - U X Vᵀ` has rank `rank`.

    Shapes: `matrix (..., m, n)`, `u (..., m, k)`, `v (..., n, k)`. Let `Q, P` project off `U` and `V`. Then `Q matrix =
    Q S` and `matrix P = S P` for the remainder `S`, and `S = (S P)(Q S P)⁺(Q S)` where these have its full rank (the
    Nyström identity).
    """
    u_inverse, v_inverse = torch.linalg.pinv(u), torch.linalg.pinv(v)
    off_u = matrix - u @ (u_inverse @ matrix)
    off_v = matrix - (matrix @ v_inverse.mT) @ v.mT
    off_both = off_u - (off_u @ v_inverse.mT) @ v.mT
    left, sigma, right = torch.linalg.svd(off_both, full_matrices=False)
    scale = torch.linalg.matrix_norm(matrix)[..., None]
    noise = sigma <= scale * torch.finfo(sigma.dtype).eps * max(matrix.shape[-2:])
    inverse = torch.where(noise, 0.0, 1.0 / torch.where(noise, 1.0, sigma))[..., :rank]
    remainder = (off_v @ right[..., :rank, :].mT * inverse[..., None, :]) @ (left[..., :rank].mT @ off_u)
    return u_inverse @ (matrix - remainder) @ v_inverse.mT
