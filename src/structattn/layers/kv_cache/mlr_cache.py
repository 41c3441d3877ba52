"""Cache the keys of MLR attention level by level, and attend to them."""

from __future__ import annotations

from torch import Tensor

from structattn.layers.kv_cache.key_value_cache import KeyValueCache, to_autocast_dtype
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice, Retention
from structattn.ops.attention import mlr_attention
from structattn.ops.decode import mlr_decode
from structattn.ops.hierarchy import Hierarchy

_MOST_DECODED_QUERIES = 16
"""Up to so many queries are decoded from the slices, each in one pass over the keys. With more queries, joining the
slices costs less than a pass for each."""


def mlr_cache_layout(hierarchy: Hierarchy, kv_heads: int, value_dim: int) -> CacheLayout:
    """Return the layout of MLR attention.

    It keeps level 1 of all keys, level `l >= 2` of the keys in the current block, and all values.
    """
    levels = zip(hierarchy.ranks, hierarchy.sizes, strict=True)
    keys = tuple(CacheSlice(kv_heads, rank, Retention(block=size)) for rank, size in levels)
    return CacheLayout(keys, CacheSlice(kv_heads, value_dim), dimension_major=True)


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
            _joined_keys(cache),
            cache.value.live,
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
        [keys.storage for keys in cache.keys],
        cache.value.storage,
        hierarchy,
        key_length=cache.length,
        level_starts=[keys.first for keys in cache.keys],
        key_start=key_start,
        scale=scale,
        enable_gqa=True,
    )


def _joined_keys(cache: KeyValueCache) -> Tensor:
    """Return keys `(B, Hkv, T, r)`, zero where a level was dropped.

    No query reads those zeros.
    """
    levels = [keys.live for keys in cache.keys]
    rows, heads, _, length = levels[0].shape
    joined = levels[0].new_zeros(rows, heads, length, sum(keys.shape[2] for keys in levels))
    offset = 0
    for keys, buffer in zip(levels, cache.keys, strict=True):
        width = keys.shape[2]
        joined[:, :, buffer.first :, offset : offset + width] = keys.transpose(-2, -1)
        offset += width
    return joined
