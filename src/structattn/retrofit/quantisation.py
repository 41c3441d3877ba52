"""Round cached keys and values to a few bits, as quantised caches do.

The arithmetic is that of KIVI (Liu et al., 2024, arXiv 2402.02750): keys are rounded channel by channel over groups of
32 tokens, values token by token over groups of 32 channels, and the newest tokens stay whole. Each group has a scale
and an offset of 16 bits. Rounding is simulated: numbers keep their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from structattn.integrations.transformers.layers import AttentionLayer
from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy

GROUP = 32
"""Numbers that share a scale and an offset."""
RECENT = 128
"""Newest tokens that stay whole, unless a hierarchy's nearest window says it."""
WHOLE_BITS = 16


def round_groups(x: Tensor, bits: int, dim: int) -> Tensor:
    """Return `x` with each group of 32 numbers along `dim` rounded to `2**bits` steps from its least to its largest."""
    x = x.movedim(dim, -1)
    length = x.shape[-1]
    groups = _padded(x).unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().to(x.dtype)
    low = low.half().to(x.dtype)
    codes = ((groups - low) / step.clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
    return (codes * step + low).flatten(-2)[..., :length].movedim(-1, dim)


def _padded(x: Tensor) -> Tensor:
    """Return `x` with its last number repeated up to whole groups."""
    missing = -x.shape[-1] % GROUP
    return F.pad(x, (0, missing), mode="replicate") if missing else x


def round_keys(key: Tensor, bits: int) -> Tensor:
    """Return keys `(B, Hkv, T, r)` rounded channel by channel, over groups of tokens."""
    return round_groups(key.flatten(0, 1), bits, 1).view_as(key)


def round_values(value: Tensor, bits: int) -> Tensor:
    """Return values `(B, Hkv, T, u)` rounded token by token, over groups of the channels of all heads."""
    channels = value.transpose(1, 2).flatten(2)
    return round_groups(channels, bits, 2).unflatten(2, (value.shape[1], -1)).transpose(1, 2)


def key_bits(bits: int) -> float:
    """Return the bits of a rounded number of a key, its share of scale and offset included."""
    return bits + 2 * WHOLE_BITS / GROUP


def value_bits(bits: int, channels: int) -> float:
    """Return the same for values, where a level has `channels` numbers of a token over all heads."""
    return bits + 2 * WHOLE_BITS * -(-channels // GROUP) / channels if channels else 0.0


def near_window(hierarchy: Hierarchy) -> int:
    """Return the distance from which a quantised cache holds rounded numbers: that of the nearest of several levels."""
    window = hierarchy.sizes[-1]
    return RECENT if hierarchy.levels == 1 or window is None else window


def cache_bits(hierarchy: Hierarchy, bits: int, layer: AttentionLayer, length: int) -> float:
    """Return the bits of a key head's keys and values at `length` tokens; the nearest window and sinks are whole."""
    values = hierarchy.value_widths(layer.width)
    whole = min(length, near_window(hierarchy) + hierarchy.sinks)
    total = 0.0
    for level, (rank, width) in enumerate(zip(hierarchy.ranks, values, strict=True)):
        live = hierarchy.live(level, length)
        exact = min(live, whole)
        mixed = value_bits(bits, width * layer.key_heads)
        total += WHOLE_BITS * (rank + width) * exact + (rank * key_bits(bits) + width * mixed) * (live - exact)
    return total


def attend_rounded(
    query: Tensor, key: Tensor, value: Tensor, hierarchy: Hierarchy, bits: int, *, scale: float
) -> Tensor:
    """Return causal attention with levels by window, where tokens beyond the nearest window are rounded.

    The nearest level has the exact numbers of its own dimensions, and the rounding errors of all others as further
    dimensions: near pairs add them up to exact numbers.

    Args:
        query: `(B, Hq, T, r)`, dimensions in the order of the levels.
        key: `(B, Hkv, T, r)`.
        value: `(B, Hkv, T, dv)`.
        hierarchy: levels by window, or one level; sinks stay exact.
        bits: bits of a rounded number.
        scale: factor on every score.
    """
    width = value.shape[3]
    ranks, values = list(hierarchy.ranks), list(hierarchy.value_widths(width))
    windows, gains = hierarchy.sizes, hierarchy.gains
    if hierarchy.levels == 1 and windows[0] is not None and windows[0] <= RECENT:
        return mlr_attention(query, key, value, hierarchy, is_causal=True, scale=scale, enable_gqa=True)
    if hierarchy.levels == 1:
        ranks, values, windows, gains = [*ranks, 0], [*values, 0], (*windows, RECENT), 2 * gains
    rank, kept = sum(ranks[:-1]), sum(values[:-1])
    far_key, far_value = round_keys(key[..., :rank], bits), value[..., :kept]
    if kept:  # level by level, since a level's numbers leave the cache together
        far_value = _join(
            *(round_values(level, bits) for level in far_value.split(values[:-1], dim=3) if level.numel())
        )
    mixed = mlr_attention(
        _join(query, query[..., :rank]),
        _join(far_key, key[..., rank:], key[..., :rank] - far_key),
        _join(far_value, value[..., kept:], value[..., :kept] - far_value),
        Hierarchy(
            (*ranks[:-1], ranks[-1] + rank),
            None,
            gains,
            windows=windows,
            value_ranks=(*values[:-1], values[-1] + kept),
            sinks=hierarchy.sinks,
        ),
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    far, near, errors = mixed.split([kept, width - kept, kept], dim=3)
    return _join(far + errors, near)


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=3)
