"""Define derivatives and `torch.func` transforms of the operators.

The operators' arguments are those of `structattn.ops.schema`; the backward operator takes `grad_out`, `out`, `lse` and
`needs_bias_grad` before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structattn.ops.schema import ARGUMENT_COUNT, TENSOR_COUNT, pad_with_none

_RESULTS = 4  # arguments of the backward operator before those of the forward one


def attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the operator's arguments and results for the backward pass."""
    ctx.save_for_backward(*output, *inputs[:TENSOR_COUNT])
    ctx.options = inputs[TENSOR_COUNT:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def attention_backward(
    ctx: Any, grad_out: Tensor | None, _: Tensor | None, backward: Callable[..., Sequence[Tensor]] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients that `backward`, by default the backward operator, gives."""
    if grad_out is None:
        return pad_with_none((), ARGUMENT_COUNT)
    out, lse, *tensors = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[3]
    backward = backward or torch.ops.structattn.mlr_attention_backward
    grads = backward(grad_out, out, lse, needs_bias_grad, *tensors, *ctx.options)
    return pad_with_none(grads, ARGUMENT_COUNT)


class MLRAttentionTransformed(torch.autograd.Function):
    """Autograd function of the operator for transforms of `torch.func`.

    Transforms do not see the operator's own registration.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp for the operator's arguments."""
        out: tuple[Tensor, Tensor] = torch.ops.structattn.mlr_attention(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what backward reads."""
        attention_setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the operator's arguments."""
        return attention_backward(ctx, grad_out, grad_lse, MLRAttentionGradientsTransformed.apply)


class MLRAttentionGradientsTransformed(torch.autograd.Function):
    """Autograd function for transforms of the backward operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Return the gradients for the backward operator's arguments."""
        return tuple(torch.ops.structattn.mlr_attention_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError("mlr_attention has no second derivative")


def forward_vmap(info: Any, axes: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Run the operator once under `vmap`, with the mapped axis as rows."""
    size = info.batch_size
    folded = _fold_call(args[:TENSOR_COUNT], axes[:TENSOR_COUNT], size)
    out, lse = torch.ops.structattn.mlr_attention(*folded, *args[TENSOR_COUNT:])
    return (_unfold(out, size), _unfold(lse, size)), (0, 0)


def backward_vmap(info: Any, axes: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    """Run the backward operator once under `vmap`."""
    size, needs_bias_grad = info.batch_size, args[_RESULTS - 1]
    given = (_to_front(tensor, at, size) for tensor, at in zip(args[:3], axes[:3], strict=True))
    call, call_axes = args[_RESULTS:], axes[_RESULTS:]
    folded = _fold_call(call[:TENSOR_COUNT], call_axes[:TENSOR_COUNT], size)
    grads = torch.ops.structattn.mlr_attention_backward(
        *(tensor.flatten(0, 1) for tensor in given), needs_bias_grad, *folded, *call[TENSOR_COUNT:]
    )
    grads = [_unfold(grad, size) for grad in grads]
    if needs_bias_grad and _to_front(call[3], call_axes[3], size).shape[1] == 1:
        grads[3] = grads[3].sum(1, keepdim=True)
    return grads, [0] * len(grads)


def _fold_call(tensors: tuple[Tensor | None, ...], axes: tuple[int | None, ...], size: int) -> list[Tensor | None]:
    """Return a call's tensors with the mapped axis folded into the batch.

    `axes` are the places of the mapped axis and `size` its length. A bias that all rows share is expanded to them. Of
    seeds the first is taken: dropout differs from row to row anyway.
    """
    query, key, value, bias, start, end, seed = (
        None if tensor is None else _to_front(tensor, at, size) for tensor, at in zip(tensors, axes, strict=True)
    )
    if query is not None and bias is not None:
        bias = bias.expand(-1, query.shape[1], -1, -1, -1)
    rows = (query, key, value, bias, start, end)
    return [*(None if tensor is None else tensor.flatten(0, 1) for tensor in rows), None if seed is None else seed[0]]


def _to_front(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """Move the mapped axis to the front; expand if there is none."""
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    """Return `(size · B, …)` as `(size, B, …)`."""
    return tensor.unflatten(0, (size, len(tensor) // size))
