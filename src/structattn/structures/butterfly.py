"""Define butterfly matrices, with the pattern of the fast Fourier transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.checks import positive_int
from structattn.structures.base import Side, Structure
from structattn.structures.contraction import Level, diagonal_blocks, multiply_per_head, multiply_shared
from structattn.structures.mlbtc import MLBTC
from structattn.structures.projection import nearest_level

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.structures.base import StructureOptions


class Butterfly(Structure):
    r"""`M = B_q … B_2 B_1` with `q = log2(dim)`: a butterfly matrix.

    `B_i` mixes the pairs of entries whose indices differ in bit `i - 1`.

    Parameters per matrix: `2 D log2 D`; rank bound and feature width `D`. The right features pass through the first
    half of the factors, the left ones through the second half, transposed. Factor `i` is the parameter
    `factor_i ([H,] D/2, 2, 2)`, one `(out, in)` matrix for each pair. Counting entries as
    `(high, bit, low)` with `low < 2^{i-1}`, the matrix of pair `(high, low)` is number `low · D/2^i + high`: then each
    factor is block diagonal once the index bits are rotated, and so are the products of a run of factors.

    `project_` factors hierarchically: a member is a BTT of rank one whose blocks are butterflies again, so rank-one
    SVDs halve the problem until pairs are left (Zheng, Riccietti and Gribonval 2023). Members are recovered; for
    other targets each split is optimal, and the whole close to it.

    Args:
        dim: Rows and columns, a power of two and at least 2.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `dim` is not a power of two of at least 2.
    """

    def __init__(
        self,
        dim: int,
        **options: Unpack[StructureOptions],
    ) -> None:
        if positive_int("dim", dim) < 2 or dim & (dim - 1):
            raise ValueError(f"dim must be a power of two of at least 2, got {dim}")
        depth = dim.bit_length() - 1
        factors = {f"factor_{i}": ((dim // 2, 2, 2), (2, 2)) for i in range(1, depth + 1)}
        super().__init__(dim, dim, factors, **options)
        self.depth = depth
        self._right_depth = (depth + 1) // 2

    def _stages(self, side: Side) -> range:
        return range(1, self._right_depth + 1) if side == "right" else range(self._right_depth + 1, self.depth + 1)

    def dense(self) -> Tensor:
        """Return the matrix itself, `([H,] dim, dim)`."""
        return self._product(range(1, self.depth + 1)).reshape(self._dense_shape())

    def _product(self, stages: Sequence[int]) -> Tensor:
        """Return the dense product of some factors, first stage rightmost: `(H, dim, dim)`."""
        like = self._stacked_factor("factor_1")
        product = torch.eye(self.dim_in, dtype=like.dtype, device=like.device)[None]
        for stage in stages:
            pairs = self._stacked_factor(f"factor_{stage}").unflatten(1, (2 ** (stage - 1), -1))
            low = torch.eye(pairs.shape[1], dtype=like.dtype, device=like.device)
            high = torch.eye(pairs.shape[2], dtype=like.dtype, device=like.device)
            sparse = torch.einsum("hlgij,lm,gk->hgilkjm", pairs, low, high)
            product = sparse.reshape(-1, self.dim_out, self.dim_in) @ product
        return product.expand(self.heads or 1, -1, -1)

    def _features(self, side: Side, rows: Tensor) -> Tensor:
        state = self._pass_through(rows.mT[None], self._stages(side), transposed=side == "left")
        return state.expand(self.heads or 1, -1, -1).permute(2, 0, 1)

    def _lift(self, side: Side, features: Tensor) -> Tensor:
        return self._pass_through(features.permute(1, 2, 0), self._stages(side), side == "right").permute(2, 0, 1)

    def _pass_through(self, state: Tensor, stages: range, transposed: bool) -> Tensor:
        """Apply factors, or their transposes, to `state (H or 1, D, N)`."""
        for stage in reversed(stages) if transposed else stages:
            state = self._descend(state, stage) if transposed else self._ascend(state, stage)
        return state

    def _ascend(self, state: Tensor, stage: int) -> Tensor:
        """Mix the lowest index bit by a factor, then move it up."""
        pairs = state.unflatten(1, (-1, 2)).transpose(2, 3)  # (.., D/2, N, 2)
        mixed = self._mix(pairs, self._stacked_factor(f"factor_{stage}").mT)
        return mixed.movedim(3, 1).flatten(1, 2)

    def _descend(self, state: Tensor, stage: int) -> Tensor:
        """Transpose :meth:`_ascend`: move the top index bit down, then mix it."""
        pairs = state.unflatten(1, (2, -1)).movedim(1, 3)
        mixed = self._mix(pairs, self._stacked_factor(f"factor_{stage}"))
        return mixed.transpose(2, 3).flatten(1, 2)

    @staticmethod
    def _mix(pairs: Tensor, weight: Tensor) -> Tensor:
        """Return `pairs (H or 1, D/2, N, 2)` times `weight (H, D/2, 2, 2)`."""
        if pairs.shape[0] == 1:
            return multiply_shared(pairs[0], weight).permute(2, 0, 1, 3)
        return multiply_per_head(pairs, weight)

    def _nearest(self, target: Tensor) -> dict[str, Tensor]:
        stages = nearest_butterfly(target)
        return {f"factor_{i}": stage.flatten(1, 2) for i, stage in enumerate(stages, start=1)}

    @torch.no_grad()
    def as_mlbtc(self) -> MLBTC:
        """Return the same matrix as a BTT of rank one, with `normalize=False`.

        The first half of the factors mixes only low index bits, so it is block diagonal. The second half mixes only
        high ones, so it is block diagonal once low and high bits are exchanged.
        """
        low, high = 2**self._right_depth, 2 ** (self.depth - self._right_depth)
        right = diagonal_blocks(self._product(self._stages("right")), high).mT  # (H, c, d, b)
        grid = self._product(self._stages("left")).reshape(-1, high, low, high, low)
        left = grid.diagonal(dim1=2, dim2=4).movedim(-1, 1)  # (H, b, a, c)
        return MLBTC.from_factors([Level(high, low, high, low)], [left], [right], heads=self.heads)

    @property
    def feature_dim(self) -> int:
        """`D`."""
        return self.dim_in

    def _feature_flops(self, side: Side) -> int:
        return (self.heads or 1) * 4 * self.dim_in * len(self._stages(side))

    def _shape_repr(self) -> str:
        return f"{self.dim_in}"


def nearest_butterfly(target: Tensor) -> list[Tensor]:
    """Return stages `(N, 2^{i-1}, n/2^i, 2, 2)` of a butterfly near `target (N, n, n)`."""
    count, n = target.shape[:2]
    if n == 2:
        return [target[:, None, None]]
    low = 2 ** (n.bit_length() // 2)
    high = n // low
    left, right = nearest_level(target, Level(high, low, high, low))  # (N, b, a, c), (N, c, d, b)
    stages = []
    for stage in nearest_butterfly(right.mT.flatten(0, 1)):  # (N·high, low', high', 2, 2)
        stages.append(stage.unflatten(0, (count, high)).transpose(1, 2).flatten(2, 3))
    for stage in nearest_butterfly(left.flatten(0, 1)):  # (N·low, low', high', 2, 2)
        stages.append(stage.unflatten(0, (count, low)).transpose(1, 2).flatten(1, 2))
    return stages
