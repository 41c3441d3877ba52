"""Attention dropout as a pure function of (seed, head, query, key).

Every backend drops the same entries, in forward and backward, whatever its tiles: no mask is stored. A generator's
stream could not be replayed tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Hash int64 tensors to 32 bits by rounds of multiply and xor-shift."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep_mask(seed: Tensor, batch_heads: Tensor, queries: Tensor, keys: Tensor, dropout_p: float) -> Tensor:
    """Return True where a probability is kept.

    The shape is that of the three indices, broadcast.

    Args:
        seed: `()` int64.
        batch_heads: int64 indices `b · Hq + h`.
        queries: int64 indices of queries in the whole tensor.
        keys: int64 indices of keys in the whole tensor.
        dropout_p: the share to drop.
    """
    state = _mix(_mix(seed.to(torch.int64)) ^ (seed >> 32))
    row = _mix(_mix(state + batch_heads * 0x9E3779B9) + queries * 0x85EBCA6B)
    return _mix(row + keys * 0xC2B2AE35) >= int(dropout_p * 2**32)
