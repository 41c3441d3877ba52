"""Cache keys and values of MLR attention by level, and attend."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.layers.kv_cache.key_value_cache import KeyValueCache, to_autocast_dtype
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice, Retention
from structattn.layers.kv_cache.sink_tokens import SinkTokens
from structattn.ops.attention import attend_with_lse
from structattn.ops.decode import mlr_decode
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import KeySpan
from structattn.ops.segments import merge_segments

_MOST_DECODED_QUERIES = 16
"""Most queries to decode, each in one pass over the slices. With more, joining the slices first is cheaper."""


def mlr_cache_layout(hierarchy: Hierarchy, kv_heads: int, value_dim: int) -> CacheLayout:
    """Return the cache layout of MLR attention.

    Keys and values of a level are kept for as long as the level reaches; sinks for good. Keys have a slice for each
    level, values one for each level that owns value dimensions.
    """
    if hierarchy.by_window:
        kept = [Retention(window=size, sinks=hierarchy.sinks if size else 0) for size in hierarchy.sizes]
    else:
        kept = [Retention(block=size) for size in hierarchy.sizes]
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
    if cache.sinks is not None:
        cache.capture_sinks(key_start)
        return _attend_with_sinks(
            query, cache, cache.sinks, hierarchy, scale=scale, key_start=key_start, attn_bias=attn_bias
        )
    if query.shape[2] > _MOST_DECODED_QUERIES or attn_bias is not None:
        return _attend_segments(query, cache, hierarchy, scale=scale, key_start=key_start, attn_bias=attn_bias)[0]
    return mlr_decode(
        to_autocast_dtype(query),
        [buffer.storage for buffer in cache.keys],
        _value_levels(cache, hierarchy, sum(cache.layout.value_widths), cache.length),
        hierarchy,
        key_length=cache.length,
        level_starts=[buffer.first for buffer in cache.keys],
        key_start=key_start,
        scale=scale,
        enable_gqa=True,
    )


def _value_levels(cache: KeyValueCache, hierarchy: Hierarchy, value_dim: int, key_length: int) -> list[Tensor]:
    """Return each level's values up to `key_length`, of width 0 where it owns none."""
    owned = [buffer.storage for buffer in cache.values]
    rows, heads = owned[0].shape[:2]
    slices = iter(owned)
    return [
        next(slices) if width else owned[0].new_empty(rows, heads, key_length - keys.first, 0)
        for width, keys in zip(hierarchy.value_widths(value_dim), cache.keys, strict=True)
    ]


def _attend_segments(
    query: Tensor,
    cache: KeyValueCache,
    hierarchy: Hierarchy,
    *,
    scale: float,
    key_start: Tensor | None,
    attn_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, merged over far and near keys.

    Level 1 alone reads far keys, all levels read near keys. These begin at the first key that level 2 reaches from the
    queries. Joining their levels copies the live keys of level 2 and the queries' own keys, and the values alike.
    """
    first_query, first_key = cache.length - query.shape[2], cache.keys[0].first
    near_start = _first_near_key(cache, hierarchy, first_query, is_padded=key_start is not None)
    near_starts = None if key_start is None else _near_starts(hierarchy, first_query, key_start, near_start)
    near_span = KeySpan(
        None if near_starts is None else near_starts - near_start, query_offset=first_query - near_start
    )
    near = attend_with_lse(
        query,
        _joined([buffer.live.mT for buffer in cache.keys], cache.keys, near_start),
        _joined([buffer.live for buffer in cache.values], cache.values, near_start),
        hierarchy,
        near_span,
        is_causal=True,
        scale=scale,
        attn_bias=_from_column(near_start, attn_bias),
    )
    near_size = hierarchy.sizes[1] if hierarchy.levels > 1 else None
    if near_size is None or (
        near_start == first_key and (near_starts is None or hierarchy.by_window or first_query < near_size)
    ):
        return near  # no row has far keys
    far_end = query.new_full(query.shape[:1], near_start, dtype=torch.int64) if near_starts is None else near_starts
    far_span = KeySpan(
        None if key_start is None else torch.minimum(key_start, far_end).sub(first_key).clamp(min=0),
        far_end - first_key,
        first_query - first_key,
    )
    values, value_width = cache.values[0].live, hierarchy.value_widths(sum(cache.layout.value_widths))[0]
    far = attend_with_lse(
        query[..., : hierarchy.ranks[0]],
        cache.keys[0].live.mT,
        values if value_width else values.new_empty(*values.shape[:2], cache.length - first_key, 0),
        Hierarchy(hierarchy.ranks[:1], gains=hierarchy.gains[:1], windows=hierarchy.sizes[:1]),
        far_span,
        is_causal=False,
        scale=scale,
        attn_bias=_from_column(first_key, attn_bias),
    )
    return merge_segments(far, near)


def _attend_with_sinks(
    query: Tensor,
    cache: KeyValueCache,
    sinks: SinkTokens,
    hierarchy: Hierarchy,
    *,
    scale: float,
    key_start: Tensor | None,
    attn_bias: Tensor | None,
) -> Tensor:
    """Merge attention to each row's sinks, at full rank, and to the keys after them, by level."""
    if sinks.keys is None or sinks.values is None:
        raise ValueError("the cache is empty: append to it first")
    first_query = cache.length - query.shape[2]
    start = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device) if key_start is None else key_start
    if query.shape[2] == 1 and attn_bias is None and sinks.is_complete:
        return _decode_with_sinks(query, cache, sinks.keys, sinks.values, hierarchy, scale=scale, start=start)
    after = (start + sinks.count).clamp(max=cache.length)
    levels = hierarchy.without_sinks()
    at_levels = _attend_segments(query, cache, levels, scale=scale, key_start=after, attn_bias=attn_bias)
    at_sinks = attend_with_lse(
        query,
        sinks.keys,
        sinks.values,
        Hierarchy.flat(hierarchy.rank),
        is_causal=False,
        scale=scale * hierarchy.gains[-1],
        attn_bias=_bias_of_sinks(attn_bias, start, first_query, cache.length, sinks.count),
    )
    return merge_segments(at_sinks, at_levels)[0]


def _decode_with_sinks(
    query: Tensor,
    cache: KeyValueCache,
    keys: Tensor,
    values: Tensor,
    hierarchy: Hierarchy,
    *,
    scale: float,
    start: Tensor,
) -> Tensor:
    """Decode one token, whose row has all its sinks, in one pass: windows `s` wider, and the sinks behind its own key.

    A token sees no key after its own, so that the order of keys counts only by the windows that they are in.
    """
    levels, count = _widened(hierarchy), keys.shape[2]
    key_levels = [
        buffer.put_behind(part.mT)
        for buffer, part in zip(cache.keys, keys.split(cache.layout.key_widths, -1), strict=True)
    ]
    for buffer, part in zip(cache.values, values.split(cache.layout.value_widths, -1), strict=True):
        buffer.put_behind(part)
    return mlr_decode(
        to_autocast_dtype(query),
        key_levels,
        _value_levels(cache, levels, values.shape[3], cache.length + count),
        levels,
        key_length=cache.length + count,
        level_starts=[buffer.first for buffer in cache.keys],
        key_start=start + count,
        scale=scale,
        enable_gqa=True,
    )


@functools.lru_cache(maxsize=256)  # every token asks for it
def _widened(hierarchy: Hierarchy) -> Hierarchy:
    """Return the levels without sinks, their windows wider by as many tokens."""
    windows = [size and size + hierarchy.sinks for size in hierarchy.sizes]
    return Hierarchy(hierarchy.ranks, gains=hierarchy.gains, windows=windows, value_ranks=hierarchy.value_ranks)


def _bias_of_sinks(bias: Tensor | None, start: Tensor, first_query: int, length: int, count: int) -> Tensor:
    """Return the bias at the sinks, `(B, 1 or Hq, Tq, s)`, minus infinity at those after a query."""
    j = torch.arange(count, device=start.device)
    i = torch.arange(first_query, length, device=start.device) - start[:, None]
    hidden = (j > i[..., None])[:, None]
    if bias is None:
        return torch.zeros(hidden.shape, dtype=torch.float32, device=start.device).masked_fill(hidden, -torch.inf)
    if bias.shape[-1] > 1:
        at = (start[:, None] + j).clamp(max=length - 1)[:, None, None]
        bias = torch.take_along_dim(bias[(None,) * (4 - bias.dim())], at, 3)
    return torch.where(hidden, -torch.inf, bias)


def _first_near_key(cache: KeyValueCache, hierarchy: Hierarchy, index: int, *, is_padded: bool) -> int:
    """Return the first key that level 2 reaches, in any row."""
    if hierarchy.levels == 1:
        return cache.keys[0].first
    kept = cache.keys[1].first
    # A cache that records keeps more than level 2 reaches. Where a padded row's blocks begin, only the device knows.
    return kept if is_padded and not hierarchy.by_window else max(kept, hierarchy.span(1, index)[0])


def _near_starts(hierarchy: Hierarchy, index: int, key_start: Tensor, near_start: int) -> Tensor:
    """Return each row's first near key, `(B,)`, where its blocks begin."""
    size = hierarchy.sizes[1] if hierarchy.levels > 1 else None
    if size is None or hierarchy.by_window:
        return key_start.clamp(min=near_start)
    return key_start + (index - key_start).clamp(min=0) // size * size


def _from_column(first: int, bias: Tensor | None) -> Tensor | None:
    """Return the columns of a bias from an index on."""
    return bias if bias is None or bias.shape[-1] == 1 else bias[..., first:]


def _joined(slices: Sequence[Tensor], buffers: Sequence[GrowingBuffer], first: int) -> Tensor:
    """Return slices `(B, Hkv, n, width)` side by side from index `first` on.

    They are zero where a level was dropped; no query reads those zeros.
    """
    if len(slices) == 1 and buffers[0].first <= first:
        return slices[0][:, :, first - buffers[0].first :]
    widths = [each.shape[3] for each in slices]
    joined = slices[0].new_zeros(*slices[0].shape[:2], buffers[0].end - first, sum(widths))
    for columns, each, buffer in zip(joined.split(widths, -1), slices, buffers, strict=True):
        start = max(buffer.first, first)
        columns[:, :, start - first :] = each[:, :, start - buffer.first :]
    return joined
