"""The key-value cache of MLR attention, and attention from it."""

from __future__ import annotations

from torch import Tensor

from structattn.layers.kv_cache.key_value_cache import CacheLayout, CachePart, KeyValueCache, Reach, in_autocast_dtype
from structattn.ops.attention import mlr_attention
from structattn.ops.decode import mlr_decode
from structattn.ops.hierarchy import Hierarchy

_FEW_QUERIES = 16
"""Up to so many queries are decoded from the levels, each in one pass over the keys; more are worth putting the keys
together for, so that queries share a pass."""


def level_cache_layout(hierarchy: Hierarchy, kv_heads: int, value_dim: int) -> CacheLayout:
    """Level 1 of all keys, level `l` of those in the current block, dimension-major; all values."""
    levels = zip(hierarchy.ranks, hierarchy.block_sizes, strict=True)
    keys = tuple(CachePart(kv_heads, rank, Reach(block=size)) for rank, size in levels)
    return CacheLayout(keys, CachePart(kv_heads, value_dim), dimension_major=True)


def attend_levels(
    query: Tensor,
    cache: KeyValueCache,
    hierarchy: Hierarchy,
    *,
    scale: float,
    key_start: Tensor | None,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """Causal MLR attention of the last tokens in a cache.

    Args:
        query: `(B, Hq, Tq, r)`, of the last `Tq` tokens.
        cache: of the layout that `level_cache_layout` gives, with the queries' own keys and values appended.
        hierarchy: the levels.
        scale: factor on every score.
        key_start: `(B,)` integers, the first real token of each row.
        attn_bias: added to the scores, broadcastable to `(B, Hq, Tq, T)`.

    Returns:
        Mixed values `(B, Hq, Tq, dv)`.
    """
    queries = query.shape[2]
    if queries > _FEW_QUERIES or attn_bias is not None:
        return mlr_attention(
            query,
            _whole_keys(cache),
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
        in_autocast_dtype(query),
        [keys.storage for keys in cache.keys],
        cache.value.storage,
        hierarchy,
        key_length=cache.length,
        level_starts=[keys.first for keys in cache.keys],
        key_start=key_start,
        scale=scale,
        enable_gqa=True,
    )


def _whole_keys(cache: KeyValueCache) -> Tensor:
    """Keys `(B, Hkv, T, r)`; zeros where a level was dropped, which no query reads."""
    levels = [keys.live for keys in cache.keys]
    rows, heads, _, length = levels[0].shape
    whole = levels[0].new_zeros(rows, heads, length, sum(keys.shape[2] for keys in levels))
    owned = 0
    for keys, timeline in zip(levels, cache.keys, strict=True):
        width = keys.shape[2]
        whole[:, :, timeline.first :, owned : owned + width] = keys.transpose(-2, -1)
        owned += width
    return whole
