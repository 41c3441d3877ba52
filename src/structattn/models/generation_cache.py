"""Wrap layer caches as the cache that `generate` uses.

It holds one `KeyValueCache` for each attention layer. `structattn.layers.kv_cache` explains what a layer keeps and for
how long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from structattn.layers.kv_cache import KeyValueCache
from structattn.ops.torch_internals import count_writes

if TYPE_CHECKING:
    from structattn.models.pretrained import StructuredModel


class GenerationCacheLayer(CacheLayerMixin):
    """`KeyValueCache` with the methods that `generate` calls on layers.

    Args:
        store: holds the keys and values.
    """

    is_croppable = True

    def __init__(self, store: KeyValueCache) -> None:
        super().__init__()
        self.store = store
        self.is_initialized = True

    @property
    def record_past(self) -> bool:
        """True if only `crop` drops entries."""
        return self.store.recording

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self.store.recording = record

    def activate_past_recording(self) -> None:
        """Let only `crop` drop entries: assisted decoding takes candidates back."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the store allocates when it is appended to."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append `(B, Hkv, T', r)` and `(B, Hkv, T', dv)`; return the store twice."""
        layout = self.store.layout
        keys, values = key_states.split(layout.key_widths, dim=-1), value_states.split(layout.value_widths, dim=-1)
        self.store.append(keys, values)
        return self.store, self.store

    def get_seq_length(self) -> int:
        """Return the number of tokens read."""
        return self.store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the key count of a mask and its first index."""
        return self.store.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Drop all tokens."""
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        A positive number is what to keep (transformers 5.17).
        """
        tokens_to_remove = int(tokens_to_remove)  # a tensor in assisted decoding of transformers 5.17
        kept = tokens_to_remove if tokens_to_remove > 0 else self.store.length + tokens_to_remove
        self.store.crop(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by the rows at these indices."""
        self.store.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at these indices."""
        self.store.take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.store.rows is not None:
            self.store.take_rows(torch.arange(self.store.rows).repeat_interleave(repeats))


class GenerationCache(Cache):
    """Cache of transformers over one `KeyValueCache` for each attention layer.

    Args:
        stores: in the order of the layers.
    """

    def __init__(self, stores: Iterable[KeyValueCache]) -> None:
        super().__init__(layers=[GenerationCacheLayer(store) for store in stores])

    @property
    def stores(self) -> list[KeyValueCache]:
        """Keys and values of each layer."""
        return [layer.store for layer in self.layers if isinstance(layer, GenerationCacheLayer)]

    @property
    def key_numbers(self) -> int:
        """Live key numbers of one row, all layers."""
        return sum(store.key_numbers for store in self.stores)

    @property
    def value_numbers(self) -> int:
        """Live value numbers of one row, all layers."""
        return sum(store.value_numbers for store in self.stores)

    @property
    def key_bytes(self) -> int:
        """Bytes of all rows' keys, room for growth included."""
        return sum(store.key_bytes for store in self.stores)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room for growth included."""
        return sum(store.nbytes for store in self.stores)


class ModelCache(GenerationCache):
    """Cache of one model of this package.

    Args:
        model: reads the tokens that the cache holds. If its parameters change afterwards, the next call with the cache
            is an error.
    """

    def __init__(self, model: StructuredModel) -> None:
        super().__init__(block.attention.new_cache() for block in model.backbone.layers)
        self._filled_by = _fingerprint(model)

    def check(self, model: StructuredModel) -> None:
        """Raise ValueError unless this model, with these parameters, filled the cache."""
        if self.get_seq_length() and _fingerprint(model) != self._filled_by:
            raise ValueError("cache was filled by another model, or its parameters changed since: make a new cache")
        self._filled_by = _fingerprint(model)


def _fingerprint(model: StructuredModel) -> tuple[int, float]:
    """Return a value that changes with the model and its parameters."""
    return id(model), count_writes(model.parameters())
