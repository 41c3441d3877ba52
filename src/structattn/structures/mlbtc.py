"""Define MLBTC, a sum of levels that contains all the other families."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.structures import contraction
from structattn.structures.base import Side, Structure
from structattn.structures.contraction import Level
from structattn.structures.projection import nearest_levels

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.structures.base import StructureOptions


class MLBTC(Structure):
    r"""`M = Σ_l α_l P_L (⊕_{k'} L_{l,k'}) P_R (⊕_k R_{l,k}ᵀ)`: Multi-Level Block Tensor Contraction.

    Parameters per matrix: `Σ_l p·c·d·b·s + p·b·a·c·s`; rank bound `min(D_out, D_in, Σ_l p·b·c·s)`, which almost
    every member attains (see :class:`Level` for the letters). `LowRank`, `MLR`, `BTT` and `Monarch` are this class
    with fixed levels; `Kronecker` and `Butterfly` convert with `as_mlbtc`. Source: arXiv 2509.07963.

    The factors are the parameters `left_1, right_1, left_2, …`, numbered by level:
    `left_l ([H,] p·b, a, c·s)`, `right_l ([H,] p·c, d, b·s)`.

    Args:
        levels: The shape of each level; all must have the same `dim_out` and `dim_in`.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `levels` is empty, holds something else, or its shapes differ.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        **options: Unpack[StructureOptions],
    ) -> None:
        self._check_levels(levels)
        factors = {}
        for number, level in enumerate(levels, start=1):
            factors[f"left_{number}"] = (level.left_shape, level.left_fans)
            factors[f"right_{number}"] = (level.right_shape, level.right_fans)
        super().__init__(levels[0].dim_out, levels[0].dim_in, factors, **options)
        self.levels = tuple(levels)

    @staticmethod
    def _check_levels(levels: Sequence[Level]) -> None:
        if not isinstance(levels, Sequence):
            raise TypeError(f"levels must be a sequence of Level, got {type(levels).__name__}")
        if not levels:
            raise ValueError("levels must hold at least one Level, got none")
        for number, level in enumerate(levels, start=1):
            if not isinstance(level, Level):
                raise TypeError(f"levels must hold Level objects, got {level!r} at level {number}")
        shapes = [(level.dim_out, level.dim_in) for level in levels]
        if len(set(shapes)) > 1:
            raise ValueError(f"levels must all have the same dim_out x dim_in, got {shapes}")

    def _factors(self, side: Side) -> list[Tensor]:
        """Return one side's factors with a head axis; right ones include weights."""
        factors = [self._stacked_factor(f"{side}_{number}") for number in range(1, len(self.levels) + 1)]
        if side == "left":
            return factors
        return [
            right if level.weight == 1.0 else level.weight * right
            for right, level in zip(factors, self.levels, strict=True)
        ]

    def dense(self) -> Tensor:
        """Return the matrix itself, `([H,] dim_out, dim_in)`."""
        levels = zip(self._factors("left"), self._factors("right"), self.levels, strict=True)
        parts = [contraction.dense_level(left, right, level) for left, right, level in levels]
        return functools.reduce(torch.add, parts).reshape(self._dense_shape())

    def _features(self, side: Side, rows: Tensor) -> Tensor:
        features = contraction.left_features if side == "left" else contraction.right_features
        parts = [features(rows, w, level) for w, level in zip(self._factors(side), self.levels, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _lift(self, side: Side, features: Tensor) -> Tensor:
        lift = contraction.lift_left if side == "left" else contraction.lift_right
        parts = features.split(self.level_features, dim=-1)
        levels = zip(parts, self._factors(side), self.levels, strict=True)
        return functools.reduce(torch.add, [lift(part, factor, level) for part, factor, level in levels])

    def _nearest(self, target: Tensor) -> dict[str, Tensor]:
        fits = [nearest_levels(matrix, self.levels) for matrix in target]
        factors: dict[str, Tensor] = {}
        for number, of_heads in enumerate(zip(*(fit.factors for fit in fits), strict=True), start=1):
            lefts, rights = zip(*of_heads, strict=True)
            factors |= {f"left_{number}": torch.stack(lefts), f"right_{number}": torch.stack(rights)}
        return factors

    @staticmethod
    @torch.no_grad()
    def from_factors(
        levels: Sequence[Level], lefts: Sequence[Tensor], rights: Sequence[Tensor], *, heads: int | None = None
    ) -> MLBTC:
        """Return the member with copies of the given factors and `normalize=False`.

        Args:
            levels: The shape of each level.
            lefts: Left factor of each level, any shape with the entries of `([H,] p·b, a, c·s)` in order.
            rights: Right factor of each level, `([H,] p·c, d, b·s)`.
            heads: Number of matrices in the stack; None for one matrix without a head axis.

        Raises:
            ValueError: a factor has another number of entries, or there are not as many factors as levels.
        """
        like = lefts[0]
        twin = MLBTC(levels, heads=heads, normalize=False, device="meta", dtype=like.dtype)
        twin.to_empty(device=like.device)  # not drawn: a conversion must not advance the random state
        for side, factors in (("left", lefts), ("right", rights)):
            if len(factors) != len(levels):
                raise ValueError(f"{side}s must hold one factor for each of {len(levels)} levels, got {len(factors)}")
            for number, factor in enumerate(factors, start=1):
                parameter = twin.get_parameter(f"{side}_{number}")
                if factor.numel() != parameter.numel():
                    shapes = f"{tuple(parameter.shape)}, got {tuple(factor.shape)}"
                    raise ValueError(f"{side}s[{number - 1}] must have shape {shapes}")
                parameter.copy_(factor.reshape(parameter.shape))
        return twin

    @torch.no_grad()
    def as_mlbtc(self) -> MLBTC:
        """Return the same matrix as a plain `MLBTC` with `normalize=False`, copied."""
        lefts, rights = (
            [self.factor(f"{side}_{number}") for number in range(1, len(self.levels) + 1)] for side in ("left", "right")
        )
        return MLBTC.from_factors(self.levels, lefts, rights, heads=self.heads)

    @property
    def feature_dim(self) -> int:
        """`Σ_l p·b·c·s`."""
        return sum(self.level_features)

    @property
    def level_features(self) -> tuple[int, ...]:
        """`p·b·c·s` of each level."""
        return tuple(level.features for level in self.levels)

    def _feature_flops(self, side: Side) -> int:
        rows = [level.a if side == "left" else level.d for level in self.levels]
        return 2 * (self.heads or 1) * sum(f * n for f, n in zip(self.level_features, rows, strict=True))

    def _shape_repr(self) -> str:
        return f"{self.levels}"
