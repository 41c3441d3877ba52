"""Define MLR attention in dense PyTorch; backends are tested against it.

The tests compare in float64. Scores and mixed values are summed level by level, as in the formula of `Hierarchy`; the
other backends take prefixes. Memory is O(Tq · Tk).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.dropout import keep_mask


def ineligible(call: Call | None = None) -> str | None:
    """Return None, because dense scores serve every call."""
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`; autograd differentiates it."""
    probability, keep, lse = _probabilities(call)
    values = _per_query_head(call, call.value).split(call.value_widths, -1)
    weights = _at_levels(call, probability * keep)
    return torch.cat([weight @ value for weight, value in zip(weights, values, strict=True)], -1), lse


def _probabilities(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, dropout factors and log-sum-exp.

    Probabilities are `(B, Hq, Tq, Tk)`, the softmax before dropout. Dropout factors broadcast to them. Log-sum-exp is
    `(B, Hq, Tq)`.
    """
    query, key = _levels(call, call.query), _levels(call, _per_query_head(call, call.key))
    score: Any = sum(w * (q @ k.mT) for w, q, k in zip(_score_factors(call), query, key, strict=True))
    if call.attn_bias is not None:
        score = score + call.attn_bias.to(call.query.dtype)
    score = score.masked_fill(~_visible(call), -torch.inf)

    no_keys_visible = (score == -torch.inf).all(-1, keepdim=True)
    score = score.masked_fill(no_keys_visible, 0.0)
    probability = torch.softmax(score, -1).masked_fill(no_keys_visible, 0.0)
    lse = torch.logsumexp(score.to(call.lse_dtype), -1).masked_fill(no_keys_visible[..., 0], torch.inf)
    if call.seed is None:
        return probability, torch.ones((), dtype=score.dtype, device=score.device), lse
    batch, heads, query_length, key_length = score.shape
    rows, columns = (torch.arange(length, device=score.device) for length in (query_length, key_length))
    rows_and_heads = torch.arange(batch * heads, device=score.device).view(batch, heads, 1, 1)
    keep = keep_mask(call.seed, rows_and_heads, rows[:, None], columns, call.dropout_p)
    return probability, keep.to(score.dtype) / (1 - call.dropout_p), lse


def _positions(call: Call) -> tuple[Tensor, Tensor]:
    """Return positions of queries `(B or 1, 1, Tq, 1)` and keys `(B or 1, 1, 1, Tk)`."""
    device = call.query.device
    start = 0 if call.key_start is None else call.key_start.view(-1, 1, 1, 1)
    i = torch.arange(call.query.shape[2], device=device).view(1, 1, -1, 1) + call.query_offset - start
    return i, torch.arange(call.key.shape[2], device=device).view(1, 1, 1, -1) - start


def _visible(call: Call) -> Tensor:
    """Return the visible pairs, `(B or 1, 1, Tq, Tk)`."""
    i, j = _positions(call)
    start = 0 if call.key_start is None else call.key_start.view(-1, 1, 1, 1)
    end = call.key.shape[2] if call.key_end is None else call.key_end.view(-1, 1, 1, 1)
    visible = (i >= 0) & (j >= 0) & (j < end - start) & call.hierarchy.reaches(0, i, j)
    return visible & (j <= i) if call.is_causal else visible


def _at_levels(call: Call, matrix: Tensor) -> list[Tensor]:
    """Return a matrix for each level, zero for pairs out of reach."""
    i, j = _positions(call)
    return [matrix, *(matrix * call.hierarchy.reaches(level, i, j) for level in range(1, call.hierarchy.levels))]


def _score_factors(call: Call) -> list[Tensor]:
    """Return `scale * c_m` for each level, zero for pairs out of reach."""
    gains = torch.tensor(call.hierarchy.gains, dtype=call.query.dtype, device=call.query.device)
    depth = call.hierarchy.depth(*_positions(call)).clamp(min=1)  # pairs that no level reaches are invisible
    return _at_levels(call, call.scale * gains[depth - 1])


def _levels(call: Call, tensor: Tensor) -> tuple[Tensor, ...]:
    """Split queries or keys by level."""
    return tensor.split(call.hierarchy.ranks, -1)


def _per_query_head(call: Call, tensor: Tensor) -> Tensor:
    """Repeat each key head for its query heads."""
    return tensor.repeat_interleave(call.query.shape[1] // tensor.shape[1], dim=1)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients, see `Backend`; they are tested against autograd through `forward`."""
    probability, keep, _ = _probabilities(call)
    query, key = _levels(call, call.query), _levels(call, _per_query_head(call, call.key))
    value, upstream = (tensor.split(call.value_widths, -1) for tensor in (_per_query_head(call, call.value), grad_out))
    reached = _at_levels(call, torch.ones_like(probability))
    probability_grad = sum(r * (g @ v.mT) for r, g, v in zip(reached, upstream, value, strict=True))
    delta = (grad_out * out).sum(-1, keepdim=True)
    score_grad = probability * (keep * probability_grad - delta)
    weighted = [factor * score_grad for factor in _score_factors(call)]
    query_grad = torch.cat([s @ k for s, k in zip(weighted, key, strict=True)], -1)
    key_grad = torch.cat([s.mT @ q for s, q in zip(weighted, query, strict=True)], -1)
    weights = _at_levels(call, probability * keep)
    value_grad = torch.cat([w.mT @ g for w, g in zip(weights, upstream, strict=True)], -1)
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        bias_grad = score_grad.sum_to_size(call.attn_bias.shape).to(call.attn_bias.dtype)
    grouped = (call.key.shape[1], -1)
    return query_grad, key_grad.unflatten(1, grouped).sum(2), value_grad.unflatten(1, grouped).sum(2), bias_grad
