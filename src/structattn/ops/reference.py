"""Define MLR attention in dense PyTorch; backends are tested against it.

The tests compare in float64. The score is summed level by level, as in the paper; the other backends take prefixes.
Memory is O(Tq · Tk).
"""

from __future__ import annotations

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.dropout import keep_mask


def ineligible(call: Call | None = None) -> str | None:
    """Return None, because dense scores serve every call."""
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`; autograd can differentiate it."""
    probability, keep, lse = _probabilities(call)
    return (probability * keep) @ _per_query_head(call, call.value), lse


def _probabilities(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, dropout factors and log-sum-exp.

    Probabilities are `(B, Hq, Tq, Tk)`, the softmax before dropout. Dropout factors broadcast to them. Log-sum-exp is
    `(B, Hq, Tq)`.
    """
    ranks = call.hierarchy.ranks
    query, key = call.query.split(ranks, -1), _per_query_head(call, call.key).split(ranks, -1)
    i, j, visible = _positions(call)
    score = sum(w * (q @ k.mT) for w, q, k in zip(_score_factors(call, i, j), query, key, strict=True))
    if call.attn_bias is not None:
        score = score + call.attn_bias.to(call.query.dtype)
    score = score.masked_fill(~visible, -torch.inf)

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


def _positions(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions of queries and keys, and the visible pairs.

    Shapes: `(B or 1, 1, Tq, 1)`, `(B or 1, 1, 1, Tk)`, `(B or 1, 1, Tq, Tk)`.
    """
    device, query_length, key_length = call.query.device, call.query.shape[2], call.key.shape[2]
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    start = (zero if call.key_start is None else call.key_start).view(-1, 1, 1, 1)
    end = (zero + key_length if call.key_end is None else call.key_end).view(-1, 1, 1, 1)
    i = torch.arange(query_length, device=device)[:, None] + call.query_offset - start
    j = torch.arange(key_length, device=device) - start
    visible = (i >= 0) & (j >= 0) & (j < end - start)
    return i, j, visible & (j <= i) if call.is_causal else visible


def _score_factors(call: Call, i: Tensor, j: Tensor) -> list[Tensor]:
    """Return `scale * c_m` per level, zero where a pair shares no block."""
    gains = torch.tensor(call.hierarchy.gains, dtype=call.query.dtype, device=call.query.device)
    factor = call.scale * gains[call.hierarchy.depth(i, j) - 1]
    return [factor if size is None else factor * (i // size == j // size) for size in call.hierarchy.block_sizes]


def _per_query_head(call: Call, tensor: Tensor) -> Tensor:
    """Repeat each key head for its query heads."""
    return tensor.repeat_interleave(call.query.shape[1] // tensor.shape[1], dim=1)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients, see `Backend`; they are tested against autograd through `forward`."""
    probability, keep, _ = _probabilities(call)
    ranks, value = call.hierarchy.ranks, _per_query_head(call, call.value)
    query, key = call.query.split(ranks, -1), _per_query_head(call, call.key).split(ranks, -1)
    delta = (grad_out * out).sum(-1, keepdim=True)
    score_grad = probability * (keep * (grad_out @ value.mT) - delta)
    weighted = [factor * score_grad for factor in _score_factors(call, *_positions(call)[:2])]
    query_grad = torch.cat([s @ k for s, k in zip(weighted, key, strict=True)], -1)
    key_grad = torch.cat([s.mT @ q for s, q in zip(weighted, query, strict=True)], -1)
    value_grad = (probability * keep).mT @ grad_out
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        bias_grad = score_grad.sum_to_size(call.attn_bias.shape).to(call.attn_bias.dtype)
    grouped = (call.key.shape[1], -1)
    return query_grad, key_grad.unflatten(1, grouped).sum(2), value_grad.unflatten(1, grouped).sum(2), bias_grad
