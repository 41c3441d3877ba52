"""Attention of other ways to a smaller cache, for measurements over whole windows.

Each is a function of query `(B, Hq, T, r)`, key `(B, Hkv, T, r)` and value `(B, Hkv, T, dv)` of one layer, as far as
its cache would keep them, and returns the mixed values `(B, Hq, T, dv)`. They have no cache and do not generate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from structattn.integrations.transformers.layer_levels import LayerLevels
from structattn.integrations.transformers.layers import DECODER, attention_layers
from structattn.models.transformers_internals import set_attention_implementation
from structattn.retrofit.quantisation import attend_rounded

IMPLEMENTATION = "structattn_rival"
"""Name of the attention implementation."""

_ATTEND = "structattn_rival"
"""Attribute of an attention layer with its function."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Maps query, key, value and the factor on every score to mixed values."""


def use_rival(model: PreTrainedModel, attend: Sequence[Attend]) -> None:
    """Give each layer of a causal model its function."""
    for layer, function in zip(attention_layers(model)[DECODER], attend, strict=True):
        vars(layer.module)[_ATTEND] = function
    set_attention_implementation(model, IMPLEMENTATION)


@dataclass
class UniformCut:
    """Keys and values of fewer dimensions for all tokens, near and far.

    This is what low-rank caches do (Thin Keys, KQ-SVD), here in the project's own bases: whole pairs of keys by their
    energy under a rotary embedding, and values in a balanced basis.

    Args:
        levels: the order of a layer's dimensions.
        rank: dimensions of keys that are kept.
        width: dimensions of values that are kept.
    """

    levels: LayerLevels
    rank: int
    width: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the mixed values, zeros in the dimensions that were cut."""
        query, key = (self.levels.arrange(each)[..., : self.rank].contiguous() for each in (query, key))
        kept = value[..., : self.width].contiguous()
        mixed = F.scaled_dot_product_attention(query, key, kept, is_causal=True, scale=scale, enable_gqa=True)
        return F.pad(mixed, (0, value.shape[3] - self.width))


@dataclass
class RoundedCache:
    """Levels whose cache holds rounded numbers beyond the nearest window.

    Args:
        levels: the layer's hierarchy and order.
        bits: bits of a rounded number.
    """

    levels: LayerLevels
    bits: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the mixed values."""
        query, key = self.levels.arrange(query), self.levels.arrange(key)
        return attend_rounded(query, key, value, self.levels.hierarchy, self.bits, scale=scale)


def _rival_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Call a layer's function, with the signature of transformers' attention functions."""
    if query.shape[2] != key.shape[2] or attention_mask is not None:
        raise ValueError("rivals are measured over whole windows without padding or a cache: pass use_cache=False")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend: Attend = vars(module)[_ATTEND]
    return attend(query, key, value, scale).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: the functions are causal by themselves."""


AttentionInterface.register(IMPLEMENTATION, _rival_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
