"""Provide the `transformers.Cache` of a model with MLR attention."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from structattn.integrations.transformers.hierarchies import levels_of
from structattn.integrations.transformers.layer_levels import LayerLevels
from structattn.integrations.transformers.layers import (
    DECODER,
    IMPLEMENTATION,
    AttentionLayer,
    attention_layers,
    is_attention,
    is_cross_attention,
)
from structattn.layers.kv_cache import KeyValueCache, mlr_cache_layout
from structattn.models.generation_cache import GenerationCache, GenerationCacheLayer
from structattn.models.transformers_internals import attention_implementation
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.torch_internals import count_writes


class CachedKeysAndValues:
    """Keys and values of one layer of an `MLRCache`.

    It is passed in place of both tensors.

    Args:
        store: cached keys and values, including the new ones.
        hierarchy: the levels that the cache keeps, inside the window.
        window: the native window of the layer; None without one.
        source: serial number of the levels and `id` of the attention layer that the cache was made for.
    """

    def __init__(self, store: KeyValueCache, hierarchy: Hierarchy, window: int | None, source: tuple[int, int]) -> None:
        self.store = store
        self.hierarchy = hierarchy
        self._window = window
        self._source = source

    @property
    def shape(self) -> torch.Size:
        """`(B, Hkv, T, r)`, counting dropped keys."""
        parts = self.store.layout.keys
        rows = self.store.rows or 0
        return torch.Size((rows, parts[0].heads, self.store.length, sum(part.width for part in parts)))

    def check(self, module: nn.Module, levels: LayerLevels, window: int | None, *, causal: bool) -> None:
        """Raise ValueError unless layer, levels and window are the cache's own.

        `window` is the one that hides keys, None where there is none.
        """
        if self._source != (levels.serial, id(module)):
            raise ValueError(
                "cache was made for another model, or before this model's hierarchy was set anew: make a new "
                "cache by make_cache(model)"
            )
        if not causal:
            raise ValueError("cache keeps the keys that a causal layer reads, and this layer is not causal")
        levels.within(window)
        if window != self._window and (window is not None or self.store.length > (self._window or math.inf)):
            raise ValueError(
                f"cache was made for a window of {self._window} tokens, and the layer has one of {window}: make a new "
                "cache by make_cache(model)"
            )


class _MLRCacheLayer(GenerationCacheLayer):
    """Cache of one layer, with keys in the order of the levels."""

    def __init__(self, layer: AttentionLayer) -> None:
        levels = levels_of(layer.module)
        # Levels by block serve only sequences that the window does not cut.
        by_block = levels.hierarchy.levels > 1 and not levels.hierarchy.by_window
        self._window = None if by_block else layer.window
        self._hierarchy = levels.within(self._window)
        super().__init__(KeyValueCache(mlr_cache_layout(self._hierarchy, layer.key_heads, layer.width)))
        self._levels = levels
        self._source = (levels.serial, id(layer.module))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append `(B, Hkv, T', r)` and `(B, Hkv, T', dv)`; return `CachedKeysAndValues` twice."""
        store, _ = super().update(self._levels.arrange(key_states), value_states)
        cached = CachedKeysAndValues(store, self._hierarchy, self._window, self._source)
        return cached, cached


class MLRCache(GenerationCache):
    """Cache of transformers that keeps each level only while it is read.

    It keeps keys and values of level `l` in the current block, or those of the last `w_l` tokens. With levels by
    window, a layer keeps nothing beyond its native sliding window. With levels by block it keeps all tokens of level 1,
    and text longer than the window is an error.

    Make one with `make_cache`. It serves only the model it was made for, with the hierarchy and parameters it had then.
    `key_numbers`, `value_numbers`, `key_bytes` and `nbytes` are its size.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = attention_layers(model)[DECODER]
        Cache.__init__(self, layers=[_MLRCacheLayer(layer) for layer in layers])
        # Weak references: a copy of the cache does not copy the model.
        self._config = weakref.ref(layers[0].config)
        self._parameters = [weakref.ref(parameter) for parameter in model.parameters()]
        self._written = self._writes()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to a layer's cache.

        Raises:
            ValueError: the model's parameters or attention implementation changed since the last call.
        """
        if layer_idx == 0:
            written, config = self._writes(), self._config()
            implementation = None if config is None else attention_implementation(config)
            if implementation != IMPLEMENTATION:
                raise ValueError(
                    f"cache stores keys level by level, which only {IMPLEMENTATION!r} reads, but the model "
                    f"has the attention implementation {implementation!r}"
                )
            if self.get_seq_length() and written != self._written:
                raise ValueError("cache was filled before the model's parameters changed: make a new cache")
            self._written = written
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _writes(self) -> float:
        """Return a number that parameter writes change; -1 once one is gone."""
        parameters = [reference() for reference in self._parameters]
        alive = [parameter for parameter in parameters if parameter is not None]
        return count_writes(alive) if len(alive) == len(parameters) else -1


class _EncoderDecoderCache(EncoderDecoderCache):
    """`MLRCache` of the decoder's self-attention, standard cache of its cross-attention."""

    def check_dynamic_cache(self, method: str) -> None:
        """Accept both caches: they crop, repeat and select, as the base class asks."""


def make_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache for `model.generate(..., cache=make_cache(model))`.

    At `T` tokens it holds `Hierarchy.cache_numbers(T, dv)` numbers for each key head, against `T · (r + dv)` in a
    standard cache; in a layer with a native sliding window those of `Hierarchy.within(window)`. Generated tokens are
    those of `use_cache=False`. If you pass no cache, `generate` makes a standard one. Before transformers 5.24 the
    keyword is `past_key_values`.

    Args:
        model: has a hierarchy and the implementation `structattn_mlr`.

    Returns:
        An `MLRCache`; for a decoder with cross-attention an `EncoderDecoderCache` that holds one.

    Raises:
        ValueError: the model has no causal attention, another implementation or no hierarchy.
    """
    layers = attention_layers(model).get(DECODER, [])
    if not layers:
        raise ValueError(f"model has no causal self-attention to cache keys for: {type(model).__name__}")
    implementation = attention_implementation(layers[0].config)
    if implementation != IMPLEMENTATION:
        raise ValueError(
            f"model must have the attention implementation {IMPLEMENTATION!r}, got {implementation!r}: call "
            "set_hierarchy(model, hierarchy)"
        )
    cache = MLRCache(model)
    if any(is_attention(module) and is_cross_attention(module) for module in model.modules()):
        return _EncoderDecoderCache(cache, DynamicCache())
    return cache
