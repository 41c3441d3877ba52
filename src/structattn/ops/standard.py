"""Attention of one level: the one place that chooses between PyTorch's kernels and the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_offset: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention over all of `r`, by whichever is fastest: `F.scaled_dot_product_attention` or `mlr_attention`.

    The rule: PyTorch's where one of its fused kernels serves the call, the op elsewhere. No fused kernel knows padding
    or an offset without a `T x T` mask; on a CPU none takes `r != dv` or dropout, where PyTorch falls back to scores in
    memory (at `T = 1024`, 32 against 64 wide, that was 2.1 times slower than the op forward and backward).

    Args:
        query: `(B, Hq, Tq, r)`.
        key: `(B, Hkv, Tk, r)`; `Hkv` divides `Hq`.
        value: `(B, Hkv, Tk, dv)`.
        is_causal: as in `mlr_attention`.
        scale: factor on every score; `1/sqrt(r)` by default.
        mask: bool, broadcastable to `(B, Hq, Tq, Tk)`, True where a pair is visible. Every query must see a key.
        key_start: as in `mlr_attention`.
        key_end: as in `mlr_attention`.
        query_offset: as in `mlr_attention`.
        dropout_p: as in `mlr_attention`.

    Returns:
        `(B, Hq, Tq, dv)`.
    """
    padded = key_start is not None or key_end is not None
    unserved_on_cpu = query.device.type == "cpu" and (query.shape[-1] != value.shape[-1] or dropout_p > 0)
    # A plain bool, which PyTorch's attention wants where a compiler's sizes are symbols.
    grouped = True if key.shape[1] != query.shape[1] else False  # noqa: SIM210
    if is_causal and not padded and query.shape[2] == 1 and query_offset == key.shape[2] - 1:
        is_causal, query_offset = False, 0  # the last query sees every key
    if not (padded or unserved_on_cpu or query_offset):
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
        )
    bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(query.dtype)
    return mlr_attention(
        query,
        key,
        value,
        Hierarchy.flat(query.shape[-1]),
        is_causal=is_causal,
        scale=scale,
        attn_bias=bias,
        key_start=key_start,
        key_end=key_end,
        query_offset=query_offset,
        enable_gqa=grouped,
        dropout_p=dropout_p,
    )
