"""The attention function that models of transformers call, for self-attention of every kind.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv), output (B, Tq, Hq, dv).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from structattn.integrations.transformers.hierarchies import levels_of
from structattn.integrations.transformers.layers import IMPLEMENTATION, is_attention, is_cross_attention
from structattn.integrations.transformers.layers import is_causal as sees_backwards
from structattn.integrations.transformers.masks import check_all, check_window, visible_keys
from structattn.integrations.transformers.transformers_cache import CachedKeys
from structattn.layers.levels import attend_levels
from structattn.ops.attention import mlr_attention

_FOREIGN = ("softcap", "s_aux", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "cache")
"""Arguments that other models give their attention and that change its meaning."""


def mlr_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MLR attention for a layer's queries, keys and values; cross-attention stays standard.

    Args:
        module: the attention layer, whose config says its hierarchy.
        query: `(B, Hq, Tq, r)`, of the last `Tq` of `Tk` tokens.
        key: `(B, Hkv, Tk, r)`, or those that an `MLRCache` holds.
        value: `(B, Hkv, Tk, dv)`.
        attention_mask: `(B, Tk)`, true for real keys; None where all are. Blocks count from a row's first one.
        scaling: factor on every score; `1/sqrt(r)` by default.
        dropout: share of probabilities to drop.
        position_bias: added to the scores, broadcastable to `(B, Hq, Tq, Tk)`.
        is_causal: instead of what the module says.
        sliding_window: must reach over all keys.
        kwargs: what else models hand over (positions, the cache's settings); what would change the meaning is refused.

    Returns:
        Mixed values `(B, Tq, Hq, dv)`; no weights, since no score matrix is ever made.

    Raises:
        ValueError: no hierarchy is set, or something is asked for that MLR attention does not have.
    """
    _refuse(module, kwargs)
    if is_cross_attention(module):
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal=False, position_bias=position_bias
        )
        return out
    causal = sees_backwards(module) if is_causal is None else is_causal
    start, end, hidden = _visible(attention_mask, key.shape[2])
    bounds, bias = (start, end), _sum(position_bias, hidden, query.dtype)
    if sliding_window is not None:
        check_window(sliding_window, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, CachedKeys):
        mixed = _attend_cached(module, query, key, scale, bias, bounds, causal=causal)
    else:
        mixed = _attend(module, query, key, value, scale, bias, bounds, dropout, causal=causal)
    return mixed.transpose(1, 2).contiguous(), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    bounds: tuple[Tensor | None, Tensor | None],
    dropout: float,
    *,
    causal: bool,
) -> Tensor:
    if not causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} has {query.shape[2]} queries and {key.shape[2]} keys without a causal mask: "
            "it is no self-attention that MLR attention knows"
        )
    levels = levels_of(module)
    return mlr_attention(
        levels.arrange(query),
        levels.arrange(key),
        value,
        levels.hierarchy,
        is_causal=causal,
        scale=scale,
        attn_bias=bias,
        key_start=bounds[0],
        key_end=bounds[1],
        query_offset=key.shape[2] - query.shape[2],
        enable_gqa=True,
        dropout_p=dropout,
    )


def _attend_cached(
    module: nn.Module,
    query: Tensor,
    key: CachedKeys,
    scale: float,
    bias: Tensor | None,
    bounds: tuple[Tensor | None, Tensor | None],
    *,
    causal: bool,
) -> Tensor:
    levels, (start, end) = levels_of(module), bounds
    key.check(module, levels, causal=causal)
    if end is not None:
        check_all(
            end == key.shape[2],
            "attention_mask must pad on the left where there is a cache, so that new tokens follow old ones",
        )
    mixed = attend_levels(
        levels.arrange(query), key.store, levels.hierarchy, scale=scale, key_start=start, attn_bias=bias
    )
    key.store.forget(start)
    return mixed


def _visible(mask: Tensor | None, key_length: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of each row where its keys begin and end, and a bias that hides some between, or None."""
    if mask is None:
        return None, None, None
    if mask.dim() != 2 or mask.shape[1] != key_length:
        raise ValueError(
            f"attention_mask must be (B, Tk) = (B, {key_length}), one entry per key, got {tuple(mask.shape)}: MLR "
            "attention takes padding, not masks of pairs"
        )
    return visible_keys(mask.bool())


def _sum(bias: Tensor | None, hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if hidden is None or bias is None:
        return bias if hidden is None else hidden.to(dtype)
    return bias + hidden.to(bias.dtype)


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """ValueError for what MLR attention does not have."""
    if not is_attention(module):
        raise ValueError(
            f"{type(module).__name__} has no `layer_idx` and `is_causal`, by which MLR attention knows its layer and "
            "what it sees"
        )
    if sees_backwards(module) and getattr(module.config, "is_causal", True) is False:
        raise ValueError("config.is_causal=False is not served: the layer was made as a causal one")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions=True is not possible with {IMPLEMENTATION!r}, which never makes the weights: use "
            'model.set_attn_implementation("eager") to see those of standard attention'
        )
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(foreign)}, which MLR attention does not have")
