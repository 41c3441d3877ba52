"""Define `mlr_attention` and check its arguments.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv), output (B, Hq, Tq, dv).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structattn import checks
from structattn.ops import operator, registry
from structattn.ops.arguments import (
    CallTensors,
    bias_with_four_axes,
    check_hierarchy,
    check_key_bound,
    check_query_offset,
    check_tensors,
)
from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan


def mlr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hierarchy: Hierarchy,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_offset: int = 0,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Compute softmax attention; far pairs share fewer dimensions than near pairs.

    See arXiv 2509.07963, section 4, and `Hierarchy`. With depth `m = m(i, j)` and prefix rank `R_m` of the hierarchy::

        score(i, j) = scale · c_m · Σ_{d < R_m} q_i[d] · k_j[d] + attn_bias(i, j)
        p(i, ·)     = softmax over the visible keys
        out_i[d]    = Σ_j p(i, j) · v_j[d]      over the pairs that the level of value dimension d reaches

    With `Hierarchy.flat(r)` it computes `torch.nn.functional.scaled_dot_product_attention`. Arguments that both have
    carry the same name; SDPA's `attn_mask` is `attn_bias` here.

    Queries without a visible key, and queries in left padding, return zeros and get zero gradients. The op has first
    derivatives in reverse mode only, also under `torch.func.grad` and `torch.vmap`.

    Args:
        query: `(B, Hq, Tq, r)`, float16, bfloat16, float32 or float64.
        key: `(B, Hkv, Tk, r)`, same dtype.
        value: `(B, Hkv, Tk, dv)`, same dtype; `dv` may differ from `r`.
        hierarchy: the levels; its ranks sum to `r`, and its value ranks, if any, to `dv`.
        is_causal: let query `i` see only keys `j <= query_offset + i`.
        scale: factor on every score; `1/sqrt(r)` by default.
        attn_bias: added to the scores; a float tensor broadcastable to `(B, Hq, Tq, Tk)`, of the query's dtype or
            float32; `-inf` masks a pair. It receives a gradient where it requires one.
        key_start: `(B,)` integers, the first valid key of each row. Positions count from it, so that padding on the
            left changes no result.
        key_end: `(B,)` integers, one past the last valid key of each row.
        query_offset: index of the first query among the keys: a chunk of queries against a longer row of keys.
        enable_gqa: allow `Hkv < Hq` (it must divide): query head `h` reads key head `h // (Hq / Hkv)`.
        dropout_p: share of probabilities to drop, the rest scaled by `1/(1 - dropout_p)`. The mask is drawn from the
            default generator (`torch.manual_seed`).
        backend: `"auto"`, or a name from `structattn.ops.backends()`.

    Returns:
        `(B, Hq, Tq, dv)` in the query's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        ValueError: the named backend cannot serve the call; the message says why.
        NotImplementedError: an input carries a forward-mode tangent.
        RuntimeError: a second derivative is asked for.
    """
    tensors = (query, key, value, attn_bias, key_start, key_end)
    if type(dropout_p) is float and dropout_p == 0.0:
        out = operator.attend_in_cpp(tensors, hierarchy, is_causal, scale, query_offset, enable_gqa, backend)
        if out is not None:
            return out
    registry.check_name(backend)
    call = _checked_call(tensors, hierarchy, is_causal, scale, query_offset, enable_gqa, dropout_p)
    return operator.attend(call, backend)


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hierarchy: Hierarchy,
    span: KeySpan = UNPADDED,
    *,
    is_causal: bool,
    scale: float,
    attn_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of `mlr_attention`, for `merge_segments`.

    Arguments are those of `mlr_attention`, with `enable_gqa`. The log-sum-exp is as `Backend.forward` defines it and
    has no gradient.
    """
    tensors = (query, key, value, attn_bias, span.key_start, span.key_end)
    call = _checked_call(tensors, hierarchy, is_causal, scale, span.query_offset, True, 0.0)
    return operator.call_operator(call, "auto")


def _checked_call(
    tensors: CallTensors,
    hierarchy: Hierarchy,
    is_causal: bool,
    scale: float | None,
    query_offset: int,
    enable_gqa: bool,
    dropout_p: float,
) -> Call:
    """Check the arguments of `mlr_attention`; return its call."""
    query, key, value, bias, start, end = tensors
    check_tensors(query, key, value, enable_gqa=enable_gqa)
    check_hierarchy(hierarchy, query, value)
    query_length, rank = query.shape[2:]
    key_length = key.shape[2]
    check_query_offset(query_offset, query_length, key_length)
    checks.boolean("is_causal", is_causal)
    bias = None if bias is None else bias_with_four_axes(bias, query, key_length)
    start, end = check_key_bound("key_start", start, query), check_key_bound("key_end", end, query)
    seed = None
    if checks.probability("dropout_p", dropout_p) > 0:
        seed = torch.randint(2**62, (), device=query.device)
    scale = 1 / math.sqrt(rank) if scale is None else checks.finite("scale", scale)
    return Call(query, key, value, bias, start, end, seed, hierarchy, is_causal, scale, query_offset, dropout_p)
