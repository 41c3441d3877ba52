"""Standard attention: the one place that chooses between PyTorch's kernels and `mlr_attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: KeySpan = UNPADDED,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute softmax attention over all of `r`.

    The faster of `F.scaled_dot_product_attention` and `mlr_attention` runs.

    PyTorch's function is used where one of its fused kernels serves the call, `mlr_attention` elsewhere. No fused
    kernel takes padding or an offset without a `T x T` mask. On a CPU none takes `r != dv` or dropout: PyTorch then
    keeps all scores in memory (at `T = 1024`, 32 against 64 wide, forward and backward took 2.1 times as long as the
    op).

    Args:
        query: `(B, Hq, Tq, r)`.
        key: `(B, Hkv, Tk, r)`; `Hkv` divides `Hq`.
        value: `(B, Hkv, Tk, dv)`.
        span: valid keys of each row and offset of the queries.
        is_causal: as in `mlr_attention`.
        scale: factor on every score; `1/sqrt(r)` by default.
        dropout_p: as in `mlr_attention`.

    Returns:
        `(B, Hq, Tq, dv)`.
    """
    unserved_on_cpu = query.device.type == "cpu" and (query.shape[-1] != value.shape[-1] or dropout_p > 0)
    # A plain bool: PyTorch's attention takes nothing else, and under a compiler sizes are symbols.
    grouped = True if key.shape[1] != query.shape[1] else False  # noqa: SIM210
    offset = span.query_offset
    if is_causal and not span.is_padded and query.shape[2] == 1 and offset == key.shape[2] - 1:
        is_causal, offset = False, 0  # the last query sees every key
    if not (span.is_padded or unserved_on_cpu or offset):
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=grouped
        )
    return mlr_attention(
        query,
        key,
        value,
        Hierarchy.flat(query.shape[-1]),
        is_causal=is_causal,
        scale=scale,
        key_start=span.key_start,
        key_end=span.key_end,
        query_offset=offset,
        enable_gqa=grouped,
        dropout_p=dropout_p,
    )
