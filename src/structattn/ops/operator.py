"""The operator behind `mlr_attention`: what autograd, autocast, compilers and FLOP counters see.

It takes plain numbers where the face takes a `Hierarchy`, and chooses the backend when it runs, so that nothing a
backend does is traced.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structattn.ops import registry, torch_internals
from structattn.ops.arguments import check_key_bounds
from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.transforms import MLRAttentionTransformed, backward_vmap, forward_vmap, gradients, keep

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed"
_CHOICES = (
    "int[] ranks, int[] block_sizes, float[] gains, bool is_causal, float scale, SymInt query_offset, "
    "float dropout_p, str backend"
)


def attend(call: Call, backend: str) -> Tensor:
    """The output `(B, Hq, Tq, dv)` of a checked call.

    Through the operator wherever something watches or rewrites operators; else straight to the backend, since the
    operator's way through Python takes longer than a short call's arithmetic.
    """
    tensors = (call.query, call.key, call.value, call.attn_bias, call.key_start, call.key_end, call.seed)
    if not torch_internals.is_plain(tensors):
        choices = _choices(call, backend)
        if torch.compiler.is_compiling():  # A compiler has its own way with transforms.
            return torch.ops.structattn.mlr_attention(*tensors, *choices)[0]
        if torch_internals.has_tangent(tensors):
            raise NotImplementedError("mlr_attention has no forward-mode derivative; use reverse mode (backward, vjp)")
        if torch_internals.may_be_transformed():
            return MLRAttentionTransformed.apply(*tensors, *choices)[0]
        return torch.ops.structattn.mlr_attention(*tensors, *choices)[0]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors[:4]):
        return MLRAttention.apply(*tensors, call, backend)
    return _run(call, backend)[0]


def _choices(call: Call, backend: str) -> tuple[Any, ...]:
    """What a call holds beside tensors, in the order of `_CHOICES`."""
    hierarchy = call.hierarchy
    numbers = (list(hierarchy.ranks), [size or 0 for size in hierarchy.block_sizes], list(hierarchy.gains))
    return (*numbers, call.is_causal, call.scale, call.query_offset, call.dropout_p, backend)


def _run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the backend of that name."""
    check_key_bounds(call.key_start, call.key_end, call.key.shape[2])
    return registry.choose(backend, call).forward(call)


class MLRAttention(torch.autograd.Function):
    """What the operator's registration says to autograd, for calls that do not pass through it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Tensors in the order of `_TENSORS`, the call that holds them, the backend's name."""
        *tensors, call, backend = args
        out, lse = _run(call, backend)
        ctx.save_for_backward(out, lse, *tensors)
        # The tensors are autograd's to hold, so that it can free them and see them change.
        ctx.choices = (call.hierarchy, call.is_causal, call.scale, call.query_offset, call.dropout_p)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and bias.

        Where they are to be differentiated again (grad mode is on), the operator gives them: it has no derivative, and
        says so when one is asked for.
        """
        out, lse, *tensors = ctx.saved_tensors
        call, needs_bias_grad = Call(*tensors, *ctx.choices), ctx.needs_input_grad[3]
        if torch.is_grad_enabled() or not torch_internals.is_plain((grad_out,)):
            choices = _choices(call, ctx.backend)
            backward = torch.ops.structattn.mlr_attention_backward
            grads = backward(grad_out, out, lse, needs_bias_grad, *tensors, *choices)
            return (*grads, *(None,) * (9 - len(grads)))
        chosen = registry.choose(ctx.backend, call)
        grads = chosen.backward(call, grad_out, out, lse, needs_bias_grad=needs_bias_grad)
        return (*grads, None, None, None, None, None)


@functools.lru_cache(maxsize=256)
def _hierarchy(ranks: tuple[int, ...], sizes: tuple[int, ...], gains: tuple[float, ...]) -> Hierarchy:
    """The hierarchy that an operator's plain numbers stand for (0: one block); kept, since every call asks for it."""
    return Hierarchy(ranks, [size or None for size in sizes], gains)


def _call(tensors: tuple[Any, ...], choices: tuple[Any, ...]) -> tuple[Call, str]:
    ranks, sizes, gains, is_causal, scale, query_offset, dropout_p, backend = choices
    hierarchy = _hierarchy(tuple(ranks), tuple(sizes), tuple(gains))
    query, key, value, bias, start, end, seed = tensors
    call = Call(query, key, value, bias, start, end, seed, hierarchy, is_causal, scale, query_offset, dropout_p)
    return call, backend


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(*_call(args[:7], args[7:]))


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, needs_bias_grad: bool, *args: Any) -> list[Tensor]:
    call, backend = _call(args[:7], args[7:])
    chosen = registry.choose(backend, call)
    grads = chosen.backward(call, grad_out, out, lse, needs_bias_grad=needs_bias_grad)
    return [grad for grad in grads if grad is not None]


def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, needs_bias_grad: bool, *args: Any) -> list[Tensor]:
    inputs = args[:4] if needs_bias_grad else args[:3]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]


def _flops(query: Any, key: Any, value: Any, choices: tuple[Any, ...], score_factor: int, value_factor: int) -> int:
    """Visible pairs times what each multiplies; padding is not seen, since the counter has shapes alone."""
    (batch, heads, query_length, _), (_, _, key_length, width) = query, value
    ranks, sizes, gains, is_causal, _, query_offset, *_ = choices
    hierarchy = _hierarchy(tuple(ranks), tuple(sizes), tuple(gains))
    pairs = hierarchy.pair_counts(query_length, key_length, is_causal=is_causal, query_offset=query_offset)
    scores = sum(rank * count for rank, count in zip(ranks, pairs, strict=True))
    return 2 * batch * heads * (score_factor * scores + value_factor * width * pairs[0])


def _register() -> None:
    forward = torch.library.custom_op(
        "structattn::mlr_attention",
        _forward,
        mutates_args=(),
        schema=f"({_TENSORS}, {_CHOICES}) -> (Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "structattn::mlr_attention_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad_out, Tensor out, Tensor lse, bool needs_bias_grad, {_TENSORS}, {_CHOICES}) -> Tensor[]",
    )
    forward.register_fake(_forward_fake)
    backward.register_fake(_backward_fake)
    forward.register_autograd(gradients, setup_context=keep)
    forward.register_vmap(forward_vmap)
    backward.register_vmap(backward_vmap)
    for device_type in ("cpu", "cuda"):
        _register_autocast(device_type)

    # Forward: one product for scores, one for values. Backward: the scores again, dv and dp (width dv), dq and dk.
    @register_flop_formula(torch.ops.structattn.mlr_attention)
    def forward_flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
        return _flops(query, key, value, rest[4:], 1, 1)

    @register_flop_formula(torch.ops.structattn.mlr_attention_backward)
    def backward_flops(
        g: Any, o: Any, lse: Any, needs: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any
    ) -> int:
        return _flops(query, key, value, rest[4:], 3, 2)


_LIBRARY = torch.library.Library("structattn", "FRAGMENT")


def _register_autocast(device_type: str) -> None:
    """Under autocast, bring query, key and value to the autocast dtype, as PyTorch's own attention does; float64 stays.

    `torch.library.register_autocast` would fix that dtype at import; the user chooses it at run time.
    """

    def autocast(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            cast = [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (query, key, value)]
            if bias is not None and bias.dtype not in (cast[0].dtype, torch.float32):
                bias = bias.float()
            return torch.ops.structattn.mlr_attention(*cast, bias, *rest)

    _LIBRARY.impl("mlr_attention", autocast, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type])


_register()
