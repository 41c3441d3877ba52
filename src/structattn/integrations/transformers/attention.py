"""Compute MLR attention when a model of transformers calls it.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv), output (B, Tq, Hq, dv).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from structattn.integrations.transformers.hierarchies import levels_of
from structattn.integrations.transformers.layers import IMPLEMENTATION, is_attention, is_cross_attention
from structattn.integrations.transformers.layers import is_causal as is_causal_layer
from structattn.integrations.transformers.masks import check_all, split_window, visible_keys
from structattn.integrations.transformers.transformers_cache import CachedKeysAndValues
from structattn.layers.kv_cache import attend_mlr_cache
from structattn.ops.attention import mlr_attention

_LOGGER = logging.getLogger(__name__)

_UNSUPPORTED_KWARGS = ("softcap", "s_aux", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "cache")
"""Keyword arguments of transformers models that MLR attention cannot honour; passing one raises."""


class _ScoreOptions(NamedTuple):
    """Scale, bias, mask and dropout of the scores of one call.

    Attributes:
        scale: factor on every score.
        bias: added to the scores, broadcastable to `(B, Hq, Tq, Tk)`; None for none.
        key_start: `(B,)`, the first real key of each row; None where it is 0.
        key_end: `(B,)`, one past the last real key of each row; None where it is `Tk`.
        is_causal: True if a token sees only itself and earlier ones.
        dropout: share of the attention probabilities to drop.
    """

    scale: float
    bias: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    is_causal: bool
    dropout: float


def mlr_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeysAndValues,
    value: Tensor | CachedKeysAndValues,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's MLR attention; cross-attention stays standard.

    The signature is that of transformers' attention functions.

    Args:
        module: the attention layer, whose config has its hierarchy.
        query: `(B, Hq, Tq, r)`, of the last `Tq` of `Tk` tokens.
        key: `(B, Hkv, Tk, r)`, or a layer of an `MLRCache`.
        value: `(B, Hkv, Tk, dv)`, or the same layer.
        attention_mask: `(B, Tk)`, true for real keys; None where all are; with a third axis for a sliding window, see
            `mlr_mask`. Positions count from a row's first real key.
        scaling: factor on every score; `1/sqrt(r)` by default.
        dropout: share of the attention probabilities to drop.
        position_bias: added to the scores, broadcastable to `(B, Hq, Tq, Tk)`.
        is_causal: overrides the module's own.
        sliding_window: the layer's native window, the most keys that a query sees, its own the last. Levels lie
            within it, see `Hierarchy.within`.
        kwargs: further arguments of transformers models. Those of `_UNSUPPORTED_KWARGS` must be None or left out, and
            `output_attentions` false; the others change nothing and are ignored.

    Returns:
        Mixed values `(B, Tq, Hq, dv)`, and None for the attention weights, which are never computed.

    Raises:
        ValueError: the layer has no hierarchy, an argument asks for what MLR attention does not have, or levels by
            block meet a window that hides keys.
    """
    _check_supported(module, kwargs)
    if is_cross_attention(module):
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal=False, position_bias=position_bias
        )
        return out
    mask, window = split_window(attention_mask, sliding_window, key.shape[2])
    key_start, key_end, hole_bias = _padding_of(mask, key.shape[2])
    scores = _ScoreOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        bias=_add_biases(position_bias, hole_bias, query.dtype),
        key_start=key_start,
        key_end=key_end,
        is_causal=is_causal_layer(module) if is_causal is None else is_causal,
        dropout=dropout,
    )
    if isinstance(key, CachedKeysAndValues):
        mixed = _attend_cached(module, query, key, window, scores)
    else:
        mixed = _attend(module, query, key, value, window, scores)
    return mixed.transpose(1, 2).contiguous(), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Any, window: int | None, scores: _ScoreOptions
) -> Tensor:
    if not scores.is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} has {query.shape[2]} queries and {key.shape[2]} keys without a causal mask: "
            "MLR attention serves self-attention, where the numbers are equal"
        )
    levels = levels_of(module)
    hierarchy = levels.within(window)
    if hierarchy.sinks and window is not None and key.shape[2] > query.shape[2]:
        raise ValueError(
            f"{type(module).__name__} has sinks and a native window of {window} tokens, and caches of transformers may "
            "have dropped the sinks before it: use make_cache(model)"
        )
    if (
        (hierarchy.levels > 1 or hierarchy.sinks)
        and key.shape[2] > query.shape[2]
        and not torch.compiler.is_compiling()
    ):
        _log_standard_cache()
    return mlr_attention(
        levels.arrange(query),
        levels.arrange(key),
        value,
        hierarchy,
        is_causal=scores.is_causal,
        scale=scores.scale,
        attn_bias=scores.bias,
        key_start=scores.key_start,
        key_end=scores.key_end,
        query_offset=key.shape[2] - query.shape[2],
        enable_gqa=True,
        dropout_p=scores.dropout,
    )


def _attend_cached(
    module: nn.Module, query: Tensor, key: CachedKeysAndValues, window: int | None, scores: _ScoreOptions
) -> Tensor:
    levels = levels_of(module)
    key.check(module, levels, window, causal=scores.is_causal)
    if scores.key_end is not None:
        check_all(
            scores.key_end == key.shape[2],
            "attention_mask must pad on the left where there is a cache, so that new tokens follow old ones",
        )
    mixed = attend_mlr_cache(
        levels.arrange(query),
        key.store,
        key.hierarchy,
        scale=scores.scale,
        key_start=scores.key_start,
        attn_bias=scores.bias,
    )
    key.store.forget(scores.key_start)
    return mixed


@functools.cache
def _log_standard_cache() -> None:
    """Warn once per process that transformers' own cache is not compressed."""
    _LOGGER.warning(
        "a model with %r generates with a cache of transformers. Its results are exact, but this cache is not "
        "compressed: structattn.integrations.transformers.make_cache(model) makes one that is.",
        IMPLEMENTATION,
    )


def _padding_of(mask: Tensor | None, key_length: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the bounds and bias of `visible_keys`, each None without a mask."""
    if mask is None:
        return None, None, None
    if mask.dim() != 2 or mask.shape[1] != key_length:
        raise ValueError(
            f"attention_mask must be (B, Tk) = (B, {key_length}), one entry per key, got {tuple(mask.shape)}: MLR "
            "attention takes padding, not masks of pairs"
        )
    return visible_keys(mask.bool())


def _add_biases(position_bias: Tensor | None, hole_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if hole_bias is None or position_bias is None:
        return position_bias if hole_bias is None else hole_bias.to(dtype)
    return position_bias + hole_bias.to(position_bias.dtype)


def _check_supported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for layers and arguments that MLR attention does not serve."""
    if not is_attention(module):
        raise ValueError(f"{type(module).__name__} is not a supported attention layer: it lacks layer_idx or is_causal")
    if is_causal_layer(module) and getattr(module.config, "is_causal", True) is False:
        raise ValueError("config.is_causal=False is not served: the layer was made as a causal one")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions=True is not possible with {IMPLEMENTATION!r}, which never computes the weights: use "
            'model.set_attn_implementation("eager") to see those of standard attention'
        )
    unsupported = [name for name in _UNSUPPORTED_KWARGS if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unsupported)}, which MLR attention does not support"
        )
