"""Define one level of MLBTC, and its batched products.

Shape legend: `N` rows, `H` heads, `p` diagonal blocks; a block maps `c·d` entries to `a·b` through rank `s`.
Factors of a level: `right (H, p·c, d, b·s)`, `left (H, p·b, a, c·s)`; features `F = p·b·c·s` in the order
`(p, b, c, s)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.checks import finite, positive_int


@dataclass(frozen=True)
class Level:
    r"""Shape of a level of `MLBTC`, diagonal blocks of Block Tensor Trains.

    One block is `P_L (⊕_{k'=1..b} L_{k'}) P_R (⊕_{k=1..c} R_kᵀ)` with `R_k (d, b·s)` and `L_{k'} (a, c·s)`; `P_R`
    regroups `(c, b, s) → (b, c, s)` and `P_L` regroups `(b, a) → (a, b)`. Entry for entry, the level is

        M[(g, i_a, i_b), (g, i_c, i_d)] = weight · Σ_s  L[g, i_b][i_a, (i_c, s)] · R[g, i_c][i_d, (i_b, s)]

    and zero between different diagonal blocks `g`. Permutations act within a diagonal block only. With `b = c = 1` both
    are the identity, and the level is the block-diagonal low-rank matrix of MLR; with `blocks = 1` it is a BTT
    (arXiv 2509.07963).

    Attributes:
        a: Rows of each left block.
        b: Number of left blocks; a block has `a·b` rows.
        c: Number of right blocks.
        d: Rows of each right block; a block has `c·d` columns.
        s: Rank of each of the `b·c` tiles of a block.
        blocks: Number of diagonal blocks.
        weight: The factor `α` of the level; not trained.

    Raises:
        TypeError, ValueError: a number is not a positive integer, or `weight` is zero or not finite.
    """

    a: int
    b: int
    c: int
    d: int
    s: int = 1
    blocks: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("a", "b", "c", "d", "s", "blocks"):
            positive_int(name, getattr(self, name))
        if finite("weight", self.weight) == 0.0:
            raise ValueError("weight must not be zero, got 0")

    @classmethod
    def low_rank(cls, dim_out: int, dim_in: int, rank: int, blocks: int = 1, weight: float = 1.0) -> Level:
        """Return a level of MLR: `blocks` diagonal blocks of rank `rank`.

        Raises:
            TypeError, ValueError: `blocks` does not divide both dims, or a number is not a positive integer.
        """
        for name, dim in (("dim_out", dim_out), ("dim_in", dim_in)):
            if positive_int(name, dim) % positive_int("blocks", blocks):
                raise ValueError(f"blocks must divide {name}={dim}, got {blocks}")
        return cls(dim_out // blocks, 1, 1, dim_in // blocks, rank, blocks, weight)

    @property
    def dim_out(self) -> int:
        """Rows of the level: `blocks·a·b`."""
        return self.blocks * self.a * self.b

    @property
    def dim_in(self) -> int:
        """Columns of the level: `blocks·c·d`."""
        return self.blocks * self.c * self.d

    @property
    def features(self) -> int:
        """Width of the level's features, `blocks·b·c·s`; its rank where dims allow."""
        return self.blocks * self.b * self.c * self.s

    @property
    def num_parameters(self) -> int:
        """Entries of both factors: `p·c·d·b·s + p·b·a·c·s`."""
        return self.features * (self.a + self.d)

    @property
    def left_shape(self) -> tuple[int, int, int]:
        """`(blocks·b, a, c·s)`."""
        return (self.blocks * self.b, self.a, self.c * self.s)

    @property
    def right_shape(self) -> tuple[int, int, int]:
        """`(blocks·c, d, b·s)`."""
        return (self.blocks * self.c, self.d, self.b * self.s)

    @property
    def left_fans(self) -> tuple[int, int]:
        """Fan-in and fan-out of a left block.

        Without tensor-train blocks (`b = c = 1`) it projects `x` as a query projection does, `a` to `s`. With
        them it is contracted onto the key side, after the right factor: `c·s` to `a`, as in the paper's runs.
        """
        return (self.a, self.s) if self.b == self.c == 1 else (self.c * self.s, self.a)

    @property
    def right_fans(self) -> tuple[int, int]:
        """Fan-in `d` and fan-out `b·s` of a right block."""
        return (self.d, self.b * self.s)


def multiply_shared(x: Tensor, weight: Tensor) -> Tensor:
    """Return shared `x (K, N, d)` times `weight (H, K, d, e)`: `(K, N, H, e)`."""
    heads, blocks, d, e = weight.shape
    side_by_side = weight.permute(1, 2, 0, 3).reshape(blocks, d, heads * e)
    return torch.bmm(x, side_by_side).unflatten(-1, (heads, e))


def multiply_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x (H, K, N, d)` times `weight (H, K, d, e)`: `(H, K, N, e)`."""
    heads, blocks, rows, d = x.shape
    product = torch.bmm(x.reshape(heads * blocks, rows, d), weight.reshape(heads * blocks, d, -1))
    return product.unflatten(0, (heads, blocks))


def right_features(y: Tensor, right: Tensor, level: Level) -> Tensor:
    """Return `P_R (⊕ R_kᵀ) y` for rows `y (N, dim_in)`: `(N, H, F)`."""
    p, b, c, s = level.blocks, level.b, level.c, level.s
    blocks = y.reshape(-1, p * c, level.d).transpose(0, 1)
    z = multiply_shared(blocks, right)  # (p·c, N, H, b·s)
    z = z.unflatten(-1, (b, s)).unflatten(0, (p, c))  # (p, c, N, H, b, s)
    return z.permute(2, 3, 0, 4, 1, 5).flatten(2)


def left_features(x: Tensor, left: Tensor, level: Level) -> Tensor:
    """Return `(⊕ L_{k'}ᵀ) P_Lᵀ x` for rows `x (N, dim_out)`: `(N, H, F)`."""
    p, a, b = level.blocks, level.a, level.b
    blocks = x.reshape(-1, p, a, b).permute(1, 3, 0, 2).reshape(p * b, -1, a)
    return multiply_shared(blocks, left).permute(1, 2, 0, 3).flatten(2)


def lift_left(features: Tensor, left: Tensor, level: Level) -> Tensor:
    """Return `P_L (⊕ L_{k'})` of features `(N, H, F)`: `(N, H, dim_out)`."""
    p, b = level.blocks, level.b
    blocks = features.unflatten(-1, (p * b, -1)).permute(1, 2, 0, 3)
    x = multiply_per_head(blocks, left.transpose(-1, -2))  # (H, p·b, N, a)
    return x.unflatten(1, (p, b)).permute(3, 0, 1, 4, 2).flatten(2)


def lift_right(features: Tensor, right: Tensor, level: Level) -> Tensor:
    """Return `(⊕ R_k) P_Rᵀ` of features `(N, H, F)`: `(N, H, dim_in)`."""
    p, b, c, s = level.blocks, level.b, level.c, level.s
    z = features.unflatten(-1, (p, b, c, s)).permute(1, 2, 4, 0, 3, 5)  # (H, p, c, N, b, s)
    y = multiply_per_head(z.flatten(4).flatten(1, 2), right.transpose(-1, -2))  # (H, p·c, N, d)
    return y.permute(2, 0, 1, 3).flatten(2)


def dense_level(left: Tensor, right: Tensor, level: Level) -> Tensor:
    """Return the level without `weight` as a matrix `(H, dim_out, dim_in)`."""
    p, a, b, c, d, s = level.blocks, level.a, level.b, level.c, level.d, level.s
    tiles_left = left.reshape(-1, p, b, a, c, s)
    tiles_right = right.reshape(-1, p, c, d, b, s)
    block = torch.einsum("hpbacs,hpcdbs->hpabcd", tiles_left, tiles_right).reshape(-1, p, a * b, c * d)
    return block_diagonal(block)


def diagonal_blocks(matrix: Tensor, blocks: int) -> Tensor:
    """Return the diagonal blocks of `matrix (H, m, n)`: `(H, blocks, m/blocks, n/blocks)`."""
    grid = matrix.unflatten(-1, (blocks, -1)).unflatten(-3, (blocks, -1))
    return grid.diagonal(dim1=-4, dim2=-2).movedim(-1, 1)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix `(H, p·m, p·n)` with diagonal blocks `(H, p, m, n)`."""
    on_diagonal = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    grid = blocks[:, :, :, None, :] * on_diagonal[:, None, :, None]
    return grid.flatten(3, 4).flatten(1, 2)


def level_tiles(matrix: Tensor, level: Level) -> Tensor:
    """Cut `matrix (H, dim_out, dim_in)` into a level's tiles, `(H, p, b, c, a, d)`.

    Tile `(i_b, i_c)` of a member of the level is `L[i_b][:, i_c, :] R[i_c][:, i_b, :]ᵀ`, of rank `s`, and no two tiles
    share a number: the best level is the best tiles.
    """
    blocks = diagonal_blocks(matrix, level.blocks)
    return blocks.unflatten(-1, (level.c, level.d)).unflatten(-3, (level.a, level.b)).permute(0, 1, 3, 4, 2, 5)


def factors_from_tiles(tiles_left: Tensor, tiles_right: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return factors of the level with tiles `tiles_left @ tiles_rightᵀ`.

    Args:
        tiles_left: `(H, p, b, c, a, s)`.
        tiles_right: `(H, p, b, c, d, s)`.
        level: The shape.

    Returns:
        `left (H, p·b, a, c·s)` and `right (H, p·c, d, b·s)`.
    """
    left = tiles_left.permute(0, 1, 2, 4, 3, 5).reshape(-1, *level.left_shape)
    right = tiles_right.permute(0, 1, 3, 4, 2, 5).reshape(-1, *level.right_shape)
    return left, right
