"""Attend to two sets of keys, and merge the results by log-sum-exp.

A call with sinks is served this way, with no kernel of its own. One segment has the sinks, at full rank; the other has
the keys after them, by level. With `lse = log(exp(lse_1) + exp(lse_2))`::

    out      = exp(lse_1 - lse) · out_1 + exp(lse_2 - lse) · out_2
    p(i, j)  = exp(score(i, j) - lse_i)                              in either segment

so that each segment's backward pass, given the merged `out` and `lse`, has its share of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from structattn.ops.call import Backend, Call
from structattn.ops.hierarchy import Hierarchy


def merge_segments(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over two sets of keys.

    Args:
        first: output and log-sum-exp, see `Backend.forward`. Its output may be narrower than the second's: it then has
            the first of the value dimensions, and the second alone mixes the others.
        second: likewise.

    Returns:
        `(B, Hq, Tq, dv)` in the outputs' dtype, zeros for queries that see no key of either; and the log-sum-exp.
    """
    lse = torch.stack([each.masked_fill(each == torch.inf, -torch.inf) for _, each in (first, second)])
    no_keys_visible = (lse == -torch.inf).all(0)
    lse = lse.masked_fill(no_keys_visible, 0.0)
    weights = torch.softmax(lse, 0)[..., None]
    merged = second[0] * weights[1]
    merged[..., : first[0].shape[3]] += first[0] * weights[0]
    return merged.to(second[0].dtype), torch.logsumexp(lse, 0).masked_fill(no_keys_visible, torch.inf)


def forward_with_sinks(call: Call, choose: Callable[[Call], Backend]) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of a call with sinks.

    `choose` names the backend of each segment.
    """
    on_sinks, after = (choose(part).forward(part) for part in _parts(call))
    return merge_segments(on_sinks, after)


def backward_with_sinks(
    call: Call, choose: Callable[[Call], Backend], grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of a call with sinks, see `Backend.backward`.

    `out` and `lse` are merged.
    """
    first, second = (
        choose(part).backward(part, grad_out, out, lse, needs_bias_grad=needs_bias_grad) for part in _parts(call)
    )
    query, key, value = (a + b for a, b in zip(first[:3], second[:3], strict=True))
    bias_grad = None
    if call.attn_bias is not None and first[3] is not None and second[3] is not None:
        bias_grad = first[3] + second[3].sum_to_size(call.attn_bias.shape)
    return query, key, value, bias_grad


def _parts(call: Call) -> tuple[Call, Call]:
    """Return the calls on the sinks and on the keys after them."""
    hierarchy, (rows, _, keys, _) = call.hierarchy, call.key.shape
    start = torch.zeros(rows, dtype=torch.int64, device=call.key.device) if call.key_start is None else call.key_start
    first = start + hierarchy.sinks
    first = first.clamp(max=keys) if call.key_end is None else torch.minimum(first, call.key_end)
    flat, scale = Hierarchy.flat(hierarchy.rank), call.scale * hierarchy.gains[-1]
    on_sinks = replace(call, hierarchy=flat, scale=scale, key_end=first)
    after = replace(call, hierarchy=hierarchy.without_sinks())
    if call.is_causal:  # queries before `first` see sinks alone, and distances are the same from any start
        return on_sinks, replace(after, key_start=first)
    return on_sinks, replace(after, attn_bias=_hidden_before(first, call))


def _hidden_before(first: Tensor, call: Call) -> Tensor:
    """Return the bias, minus infinity at each row's keys before `first`."""
    before = torch.arange(call.key.shape[2], device=first.device) < first.view(-1, 1, 1, 1)
    if call.key_start is None and call.key_end is None:
        before = before[:1]  # the same in all rows
    bias = torch.zeros((), dtype=call.lse_dtype, device=first.device) if call.attn_bias is None else call.attn_bias
    return torch.where(before, -torch.inf, bias)
