"""What autograd and the transforms of `torch.func` do with the operators of `mlr_attention`.

The operators' arguments are those of the schema in `structattn.ops.operator`: seven tensors (query, key, value, bias,
key_start, key_end, seed), then eight numbers and choices; the backward pass takes `grad_out`, `out`, `lse` and whether
the bias needs a gradient before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward pass reads, of the operator's arguments and what it gave."""
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.choices = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, grad_out: Tensor | None, _: Tensor | None, backward: Callable[..., Sequence[Tensor]] | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's arguments, by the operator of the backward pass or what stands for it."""
    if grad_out is None:
        return (None,) * 15
    out, lse, *tensors = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[3]
    backward = backward or torch.ops.structattn.mlr_attention_backward
    grads = backward(grad_out, out, lse, needs_bias_grad, *tensors, *ctx.choices)
    return (*grads, *(None,) * (15 - len(grads)))


class MLRAttentionTransformed(torch.autograd.Function):
    """The operator under the transforms of `torch.func`, which do not see its own registration with autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, of the operator's arguments."""
        out: tuple[Tensor, Tensor] = torch.ops.structattn.mlr_attention(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what backward reads."""
        keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients, by the operator."""
        return gradients(ctx, grad_out, grad_lse, MLRAttentionGradientsTransformed.apply)


class MLRAttentionGradientsTransformed(torch.autograd.Function):
    """The operator of the backward pass, in the same place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Gradients, of the operator's arguments."""
        return tuple(torch.ops.structattn.mlr_attention_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """There is no second derivative."""
        raise NotImplementedError("mlr_attention has no second derivative")


def _fold(tensors: tuple[Tensor | None, ...], axes: tuple[int | None, ...], size: int) -> list[Tensor | None]:
    """The tensors of a call whose axes `axes` of length `size` are `vmap`'s, with that axis folded into the rows.

    A bias that rows share is spread over them. A seed stays one: dropout differs from row to row.
    """
    query, key, value, bias, start, end, seed = (
        None if tensor is None else tensor.expand(size, *tensor.shape) if at is None else tensor.movedim(at, 0)
        for tensor, at in zip(tensors, axes, strict=True)
    )
    if query is not None and bias is not None:
        bias = bias.expand(-1, query.shape[1], -1, -1, -1)
    rows = (query, key, value, bias, start, end)
    return [*(None if tensor is None else tensor.flatten(0, 1) for tensor in rows), None if seed is None else seed[0]]


def forward_vmap(info: Any, axes: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The operator with one axis more: one call with that axis among the rows."""
    size = info.batch_size
    folded = _fold(args[:7], axes[:7], size)
    out, lse = torch.ops.structattn.mlr_attention(*folded, *args[7:])
    return (out.unflatten(0, (size, len(out) // size)), lse.unflatten(0, (size, len(lse) // size))), (0, 0)


def backward_vmap(info: Any, axes: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    """The same of its backward pass."""
    size, needs_bias_grad, bias, bias_axis = info.batch_size, args[3], args[7], axes[7]
    given = [
        tensor.expand(size, *tensor.shape) if at is None else tensor.movedim(at, 0)
        for tensor, at in zip(args[:3], axes[:3], strict=True)
    ]
    folded = _fold(args[4:11], axes[4:11], size)
    first = (tensor.flatten(0, 1) for tensor in given)
    grads = torch.ops.structattn.mlr_attention_backward(*first, needs_bias_grad, *folded, *args[11:])
    grads = [grad.unflatten(0, (size, len(grad) // size)) for grad in grads]
    if needs_bias_grad and bias.movedim(bias_axis or 0, 0).shape[0 if bias_axis is None else 1] == 1:
        grads[3] = grads[3].sum(1, keepdim=True)
    return grads, [0] * len(grads)
