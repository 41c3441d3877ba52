"""Options that all attention layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, get_args

import torch

from structattn import checks
from structattn.layers.rotary import RotaryEmbedding
from structattn.ops.standard import StandardKernel


@dataclass(frozen=True)
class LayerOptions:
    """Options of every attention layer.

    Args:
        kv_heads: heads of keys and values, a divisor of `heads`: query head `h` reads key head `h // (H / kv_heads)`.
            By default as many as query heads.
        is_causal: hide later tokens from each token.
        bias: give the projections biases.
        dropout: share of attention probabilities dropped in training.
        rotary: rotary embedding of queries and keys.
        standard_kernel: kernel where all of a head is multiplied for all pairs (standard and bilinear attention, the
            global part of `gswa`), see `structattn.ops.standard.StandardKernel`. Results agree up to rounding.
        device: of the parameters.
        dtype: of the parameters.
        generator: source of the initial parameters.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """

    kv_heads: int | None = None
    is_causal: bool = True
    bias: bool = False
    dropout: float = 0.0
    rotary: RotaryEmbedding | None = None
    standard_kernel: StandardKernel = "auto"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        checks.probability("dropout", self.dropout)
        checks.one_of("standard_kernel", self.standard_kernel, get_args(StandardKernel))
        if self.rotary is not None and not isinstance(self.rotary, RotaryEmbedding):
            raise TypeError(f"rotary must be a RotaryEmbedding or None, got {type(self.rotary).__name__}")


class SharedKeywords(TypedDict, total=False):
    """Keyword arguments of every layer's constructor, which `LayerOptions` describes."""

    kv_heads: int | None
    is_causal: bool
    bias: bool
    dropout: float
    rotary: RotaryEmbedding | None
    standard_kernel: StandardKernel
    generator: torch.Generator | None


class LayerKeywords(SharedKeywords, total=False):
    """Keyword arguments of layers that make all their parameters, which `LayerOptions` describes."""

    device: torch.device | str | None
    dtype: torch.dtype | None
