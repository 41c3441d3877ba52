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

from structattn.ops import registry
from structattn.ops.arguments import check_key_bounds
from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed"
_CHOICES = (
    "int[] ranks, int[] block_sizes, float[] gains, bool is_causal, float scale, SymInt query_offset, "
    "float dropout_p, str backend"
)


def attend(
    tensors: tuple[Tensor | None, ...],
    hierarchy: Hierarchy,
    is_causal: bool,
    scale: float,
    query_offset: int,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Call the operator: `tensors` as in `_TENSORS`, all of it checked; the output `(B, Hq, Tq, dv)`."""
    numbers = (list(hierarchy.ranks), [size or 0 for size in hierarchy.block_sizes], list(hierarchy.gains))
    choices = (*numbers, is_causal, scale, query_offset, dropout_p, backend)
    return torch.ops.structattn.mlr_attention(*tensors, *choices)[0]


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
    call, backend = _call(args[:7], args[7:])
    check_key_bounds(call.key_start, call.key_end, call.key.shape[2])
    return registry.choose(backend, call).forward(call)


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.choices = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 15
    out, lse, *tensors = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[3]
    backward = torch.ops.structattn.mlr_attention_backward
    grads = backward(grad_out, out, lse, needs_bias_grad, *tensors, *ctx.choices)
    return (*grads, *(None,) * (15 - len(grads)))


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
    forward.register_autograd(_autograd, setup_context=_setup_context)
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
    """Under autocast, bring query, key and value to the autocast dtype, as PyTorch's own attention does.

    `torch.library.register_autocast` would fix that dtype at import; the user chooses it at run time.
    """
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            cast = [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (query, key, value)]
            return torch.ops.structattn.mlr_attention(*cast, *rest)

    _LIBRARY.impl("mlr_attention", autocast, key)


_register()
