"""Cache the keys and values of MLR attention level by level, and attend to them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.layers.kv_cache.key_value_cache import KeyValueCache, to_autocast_dtype
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice, Retention
from structattn.ops.attention import mlr_attention
from structattn.ops.decode import mlr_decode
from structattn.ops.hierarchy import Hierarchy

_MOST_DECODED_QUERIES = 16
"""Up to so many queries are decoded from the slices, each in one pass over the keys. With more queries, joining the
slices costs less than a pass for each."""


def mlr_cache_layout(hierarchy: Hierarchy, kv_heads: int, value_dim: int) -> CacheLayout:
    """Return the layout of MLR attention: keys and values of each level for as long as the level reaches.

    Keys have a slice for each level, values one for each level that owns value dimensions.
    """
    kept = [Retention(window=size) if hierarchy.by_window else Retention(block=size) for size in hierarchy.sizes]
    keys, values = (
        tuple(CacheSlice(kv_heads, width, each) for width, each in zip(widths, kept, strict=True) if width)
        for widths in (hierarchy.ranks, hierarchy.value_widths(value_dim))
    )
    return CacheLayout(keys, values, dimension_major=True)


def attend_mlr_cache(
    query: Tensor,
    cache: KeyValueCache,
    hierarchy: Hierarchy,
    *,
    scale: float,
    key_start: Tensor | None,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """Compute causal MLR attention of the last tokens in a cache.

    Args:
        query: `(B, Hq, Tq, r)`, of the last `Tq` tokens.
        cache: has the layout of `mlr_cache_layout`, and already holds the queries' own keys and values.
        hierarchy: the levels.
        scale: factor on every score.
        key_start: `(B,)` integers, the first real token of each row.
        attn_bias: added to the scores, broadcastable to `(B, Hq, Tq, T)`.

    Returns:
        Mixed values `(B, Hq, Tq, dv)`.
    """
    queries = query.shape[2]
    if queries > _MOST_DECODED_QUERIES or attn_bias is not None:
        return mlr_attention(
            query,
            _joined([buffer.live.transpose(-2, -1) for buffer in cache.keys], cache.keys),
            _joined([buffer.live for buffer in cache.values], cache.values),
            hierarchy,
            is_causal=True,
            scale=scale,
            attn_bias=attn_bias,
            key_start=key_start,
            query_offset=cache.length - queries,
            enable_gqa=True,
        )
    return mlr_decode(
        to_autocast_dtype(query),
        [buffer.storage for buffer in cache.keys],
        _value_levels(cache, hierarchy, sum(cache.layout.value_widths)),
        hierarchy,
        key_length=cache.length,
        level_starts=[buffer.first for buffer in cache.keys],
        key_start=key_start,
        scale=scale,
        enable_gqa=True,
    )


def _value_levels(cache: KeyValueCache, hierarchy: Hierarchy, value_dim: int) -> list[Tensor]:
    """Return the values of each level, without dimensions where the level owns none."""
    owned = [buffer.storage for buffer in cache.values]
    rows, heads = owned[0].shape[:2]
    slices = iter(owned)
    return [
        next(slices) if width else owned[0].new_empty(rows, heads, cache.length - keys.first, 0)
        for width, keys in zip(hierarchy.value_widths(value_dim), cache.keys, strict=True)
    ]


def _joined(slices: Sequence[Tensor], buffers: Sequence[GrowingBuffer]) -> Tensor:
    """Return slices `(B, Hkv, T, width)` side by side, zero where a level was dropped; no query reads those zeros."""
    rows, heads = slices[0].shape[:2]
    joined = slices[0].new_zeros(rows, heads, buffers[0].end, sum(each.shape[3] for each in slices))
    for columns, each, buffer in zip(
        joined.split([each.shape[3] for each in slices], -1), slices, buffers, strict=True
    ):
        columns[:, :, buffer.first :] = each
    return joined
