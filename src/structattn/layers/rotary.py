"""Rotary position embedding whose pairs stay inside a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from structattn import checks
from structattn.layers.choices import Frequencies


@dataclass(frozen=True)
class RotaryEmbedding:
    r"""Rotation of neighbouring pairs of dimensions `(2i, 2i+1)` by `position · θ_i`.

    Source: Su et al. 2021, arXiv 2104.09864. A score of rotated vectors depends on the distance of their positions
    alone. For that to hold level by level, no pair may lie in two levels: so pairs are neighbours, not `i` and
    `i + r/2`, and every level rank is even.

    It holds no tensors, so one object serves layers of any width.

    Args:
        base: `θ_i = base^{-2i/r}` for pair `i` of a head of width `r`.
        frequencies: fall of the rates over the levels. `"whole"`: over the whole head, so that level 1 gets the fastest
            pairs. `"per_level"`: within each level, `base^{-2i/r_l}`. `"slow_far"`: over the whole head in reverse, so
            that level 1, which far pairs share, gets the slowest pairs. `"near_only"`: over the levels after the
            first; level 1 is not rotated.

    Raises:
        TypeError, ValueError: `base` is not a number above 1, or `frequencies` is no known choice.
    """

    base: float = 10_000.0
    frequencies: Frequencies = "whole"

    def __post_init__(self) -> None:
        if checks.finite("base", self.base) <= 1.0:
            raise ValueError(f"base must be above 1, got {self.base}")
        checks.one_of("frequencies", self.frequencies, get_args(Frequencies))

    def check(self, level_ranks: Sequence[int]) -> None:
        """Raise ValueError if a level's rank is odd, naming the level."""
        for level, rank in enumerate(level_ranks, start=1):
            if rank % 2:
                raise ValueError(
                    f"a rotary embedding needs even level ranks, so that no pair lies in two levels; "
                    f"got rank {rank} at level {level} of {'|'.join(map(str, level_ranks))}"
                )

    def __call__(self, x: Tensor, positions: Tensor, level_ranks: Sequence[int]) -> Tensor:
        """Rotate each pair of `x` by its position's angle.

        Args:
            x: `(B, H, T, r)`.
            positions: `(T,)` or `(B, T)` integers.
            level_ranks: widths of the levels, which sum to `r`; `(r,)` without levels.

        Returns:
            `(B, H, T, r)` in the dtype of `x`; angles are computed in at least float32.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        angles = positions.to(precise)[..., None] * self._rates(level_ranks, x.device, precise)  # ([B,] T, r/2)
        if positions.dim() == 2:
            angles = angles[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)

    def _rates(self, level_ranks: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return `θ_i` of every pair, `(r/2,)`, in radians per position."""

        def falling(width: int) -> Tensor:
            return self.base ** (-torch.arange(0, width, 2, device=device, dtype=dtype) / width)

        match self.frequencies:
            case "whole":
                return falling(sum(level_ranks))
            case "per_level":
                return torch.cat([falling(width) for width in level_ranks])
            case "slow_far":
                return falling(sum(level_ranks)).flip(0)
            case "near_only":
                first, *others = level_ranks
                return torch.cat([torch.zeros(first // 2, device=device, dtype=dtype), falling(sum(others))])
