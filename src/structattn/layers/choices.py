"""Name the choices of layers and give their scales' values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from structattn import checks

HeadScale = Literal["1/sqrt(r)", "8/r", "1/r", "1"]
LevelWeight = Literal["1/r_l", "1/sqrt(r_l)", "1/r", "1/sqrt(r)", "8/r", "1"]
BilinearScale = Literal["1/sqrt(D)", "1/D", "1/sqrt(f_l)", "1/f_l", "1"]
Gains = Literal["mean", "none"]
Frequencies = Literal["whole", "per_level", "slow_far", "near_only"]
Side = Literal["auto", "split", "key", "query"]
Norm = Literal["features", "key", "none"]


def head_scale(name: str, rank: int) -> float:
    """Return the factor on the scores of a head of rank `r`.

    `"1/sqrt(r)"` is usual. `"8/r"`, equal to it at `r = 64`, is the paper's for language. `"1/r"` is muP's. `"1"`
    leaves the size of the logits to the projections, as T5 does.
    """
    checks.one_of("scale", name, get_args(HeadScale))
    return {"1/sqrt(r)": 1 / math.sqrt(rank), "8/r": 8 / rank, "1/r": 1 / rank, "1": 1.0}[name]


def level_weights(name: str, ranks: Sequence[int]) -> tuple[float, ...]:
    """Return the factor on each level's share of the dot product.

    Ranks are `r_1 … r_L`, and `r = Σ r_l`. `"1/sqrt(r_l)"` gives every level's share the same spread. `"1/r_l"` is the
    paper's. Weights without `r_l` are the scales of standard attention (`head_scale`): a pair that shares all levels
    then scores as in standard attention.
    """
    checks.one_of("level_weight", name, get_args(LevelWeight))
    rank = sum(ranks)
    if name in get_args(HeadScale):
        return (head_scale(name, rank),) * len(ranks)
    return tuple(1 / r if name == "1/r_l" else 1 / math.sqrt(r) for r in ranks)


def bilinear_scales(name: str, dim: int, level_features: Sequence[int]) -> tuple[float, ...]:
    """Return the factor on each level's share of a bilinear score.

    The model is `D` wide, and level `l` has `f_l` features. `"1/sqrt(D)"` (option `"1/D"`) is the paper's for a Block
    Tensor Train. `"1/sqrt(f_l)"`, `f_l = p_l·r_l`, is the paper's for MLR; for a low-rank matrix it equals the scale of
    standard attention.
    """
    checks.one_of("scale", name, get_args(BilinearScale))
    fixed = {"1/sqrt(D)": 1 / math.sqrt(dim), "1/D": 1 / dim, "1": 1.0}
    if name in fixed:
        return (fixed[name],) * len(level_features)
    return tuple(1 / f if name == "1/f_l" else 1 / math.sqrt(f) for f in level_features)


def spread(weights: Sequence[float], widths: Sequence[int], like: Tensor) -> Tensor:
    """Repeat weights over their widths, `(sum(widths),)`, in the dtype of `like`."""
    parts = zip(widths, weights, strict=True)
    return torch.cat([torch.full((width,), weight, device=like.device, dtype=like.dtype) for width, weight in parts])
