"""Register the operator behind `mlr_attention`.

Autograd, autocast, compilers and FLOP counters see this operator. Its arguments are those of `structattn.ops.schema`.
It chooses the backend when it runs, so that nothing a backend does is traced.

Here it is defined in Python, for all devices. The compiled library of the CPU kernel (`structattn.ops.cpu.library`)
gives it a kernel in C++ for tensors on the CPU, and derivatives in C++ where it is built from source.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structattn import checks
from structattn.ops import cpu, registry, schema, torch_internals
from structattn.ops.arguments import CallTensors, check_key_bounds
from structattn.ops.call import Call, lse_dtype
from structattn.ops.cpu import library
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.segments import backward_with_sinks, forward_with_sinks
from structattn.ops.transforms import (
    MLRAttentionTransformed,
    attention_backward,
    attention_setup_context,
    backward_vmap,
    forward_vmap,
)


def may_run_in_cpp(hierarchy: Hierarchy, position: int, backend: str) -> bool:
    """Return True if a call's options let it go straight to C++."""
    return (
        not torch.compiler.is_compiling()  # first: what a compiler reads, it guards
        and library.state.loaded
        and torch_internals.is_untransformed()
        and (backend == "auto" or backend == "cpu")
        and type(hierarchy) is Hierarchy
        and not hierarchy.sinks
        and type(position) is int
    )


def attend_in_cpp(
    tensors: CallTensors,
    hierarchy: Hierarchy,
    is_causal: bool,
    scale: float | None,
    query_offset: int,
    enable_gqa: bool,
    backend: str,
) -> Tensor | None:
    """Run a call without dropout in C++, or return None.

    The kernel checks its arguments; what it cannot see is checked here. On None, `attend` serves the call, or the
    checks in Python raise.
    """
    if not may_run_in_cpp(hierarchy, query_offset, backend) or type(is_causal) is not bool:
        return None
    query, key, value, bias, key_start, key_end = tensors
    try:
        if (
            not torch_internals.all_plain(tensors)
            or not (query.is_cpu and key.is_cpu and value.is_cpu)
            or query.dtype not in library.DTYPES
            or not (enable_gqa or key.size(1) == query.size(1))
            or not (bias is None or (bias.is_cpu and bias.dim() == 4))
            or not (key_start is None or key_start.is_cpu)
            or not (key_end is None or key_end.is_cpu)
        ):
            return None
        scale = 1 / math.sqrt(hierarchy.rank) if scale is None else checks.finite("scale", scale)
        options = (hierarchy.text, is_causal, scale, query_offset, 0.0, backend)
        operator = torch.ops.structattn.mlr_attention.default
        if library.state.differentiates:
            results = operator(*tensors, None, *options)
        elif torch_internals.need_grad(tensors):
            return None
        else:
            with torch_internals.below_autograd():
                results = operator(*tensors, None, *options)
    except (AttributeError, TypeError, ValueError):
        return None
    out: Tensor = results[0]
    return out


def attend(call: Call, backend: str) -> Tensor:
    """Return the output `(B, Hq, Tq, dv)` of a checked call.

    Use the registered operator under torch.compile, autocast, profilers, dispatch modes and function transforms, and
    where it is C++ as far as the kernel. Otherwise call the backend directly: dispatch through Python costs more than a
    short call.
    """
    tensors = schema.tensors_of(call)
    if not torch_internals.is_plain(tensors):
        if not torch.compiler.is_compiling() and torch_internals.has_tangent(tensors):
            raise NotImplementedError("mlr_attention has no forward-mode derivative; use reverse mode (backward, vjp)")
        return call_operator(call, backend)[0]
    if backend == "auto" and library.state.differentiates and cpu.ineligible(call) is None:
        return call_operator(call, backend)[0]
    if torch_internals.need_grad(tensors[:4]):
        return _DirectMLRAttention.apply(*tensors, call, backend)
    return _run(call, backend)[0]


def call_operator(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp from the registered operator."""
    arguments = (*schema.tensors_of(call), *schema.options_of(call, backend))
    results: tuple[Tensor, Tensor]
    # The compiler traces transforms itself, so the operator must not.
    if not torch.compiler.is_compiling() and torch_internals.may_be_transformed():
        results = MLRAttentionTransformed.apply(*arguments)
    else:
        results = torch.ops.structattn.mlr_attention(*arguments)
    return results


def _run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, for direct and registered calls alike."""
    check_key_bounds(call.key_start, call.key_end, call.key.shape[2])
    if _has_sinks_apart(call, backend):
        return forward_with_sinks(call, functools.partial(registry.choose, backend))
    return registry.choose(backend, call).forward(call)


def _has_sinks_apart(call: Call, backend: str) -> bool:
    """Return True if sinks are a segment of their own. The definition has them by `Hierarchy.reaches`."""
    return call.hierarchy.sinks > 0 and backend != "reference"


class _DirectMLRAttention(torch.autograd.Function):
    """Autograd function of a call that bypasses the registered operator."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Return the output for `(*tensors of schema.TENSORS, call, backend)`."""
        *tensors, call, backend = args
        out, lse = _run(call, backend)
        ctx.save_for_backward(out, lse, *tensors)
        # Save tensors only through ctx: autograd frees them and detects in-place changes. Do not keep the Call.
        ctx.options = schema.options_of(call, backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value and bias.

        With create_graph=True, the registered operator computes them. It has no second derivative and raises when one
        is asked for.
        """
        out, lse, *tensors = ctx.saved_tensors
        is_watched = torch.is_grad_enabled() or not torch_internals.is_plain((grad_out,))
        backward = torch.ops.structattn.mlr_attention_backward if is_watched else _backward
        grads = backward(grad_out, out, lse, ctx.needs_input_grad[3], *tensors, *ctx.options)
        return schema.pad_with_none(grads, schema.TENSOR_COUNT + 2)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(*schema.unpack(args))


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return query.new_empty(*query.shape[:3], value.shape[3]), lse


def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, needs_bias_grad: bool, *args: Any) -> list[Tensor]:
    call, backend = schema.unpack(args)
    if _has_sinks_apart(call, backend):
        choose = functools.partial(registry.choose, backend)
        grads = backward_with_sinks(call, choose, grad_out, out, lse, needs_bias_grad=needs_bias_grad)
    else:
        grads = registry.choose(backend, call).backward(call, grad_out, out, lse, needs_bias_grad=needs_bias_grad)
    return [grad for grad in grads if grad is not None]


def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, needs_bias_grad: bool, *args: Any) -> list[Tensor]:
    inputs = args[:4] if needs_bias_grad else args[:3]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]


def _flops(arguments: tuple[Any, ...], score_products: int, value_products: int) -> int:
    """Return the FLOPs of one call; `arguments` hold shapes instead of tensors.

    Only visible pairs count. Padding counts as visible, because shapes do not show it.
    """
    (batch, heads, query_length, _), _, (_, _, key_length, width) = arguments[:3]
    call, _ = schema.unpack(arguments)
    lengths: Any = {"is_causal": call.is_causal, "query_offset": call.query_offset}
    scores = call.hierarchy.score_flops(query_length, key_length, **lengths)
    mixing = call.hierarchy.mixing_flops(query_length, key_length, value_dim=width, **lengths)
    return int(batch * heads * (score_products * scores + value_products * mixing))


def _register() -> None:
    forward = torch.library.custom_op(
        "structattn::mlr_attention",
        _forward,
        mutates_args=(),
        schema=f"({schema.TENSORS}, {schema.OPTIONS}) -> (Tensor, Tensor)",
    )
    results = "Tensor grad_out, Tensor out, Tensor lse, bool needs_bias_grad"
    backward = torch.library.custom_op(
        "structattn::mlr_attention_backward",
        _backward,
        mutates_args=(),
        schema=f"({results}, {schema.TENSORS}, {schema.OPTIONS}) -> Tensor[]",
    )
    _LIBRARY.define(f"mlr_attention_in_python({schema.TENSORS}, {schema.OPTIONS}) -> Tensor[]")
    _LIBRARY.define(f"mlr_attention_backward_in_python({results}, {schema.TENSORS}, {schema.OPTIONS}) -> Tensor[]")
    _LIBRARY.impl("mlr_attention_in_python", schema.in_python(_forward), "CompositeExplicitAutograd")
    _LIBRARY.impl("mlr_attention_backward_in_python", schema.in_python(_backward), "CompositeExplicitAutograd")
    forward.register_fake(_forward_fake)
    backward.register_fake(_backward_fake)
    forward.register_autograd(attention_backward, setup_context=attention_setup_context)
    forward.register_vmap(forward_vmap)
    backward.register_vmap(backward_vmap)
    for device_type in ("cpu", "cuda"):
        _register_autocast(device_type)

    # Forward: one product for scores, one for values. Backward: the scores again, dv and dp (width dv), dq and dk.
    @register_flop_formula(torch.ops.structattn.mlr_attention)
    def forward_flops(*arguments: Any, **_: Any) -> int:
        return _flops(arguments, 1, 1)

    @register_flop_formula(torch.ops.structattn.mlr_attention_backward)
    def backward_flops(*arguments: Any, **_: Any) -> int:
        return _flops(arguments[4:], 3, 2)


_LIBRARY = torch.library.Library("structattn", "FRAGMENT")


def _register_autocast(device_type: str) -> None:
    """Cast query, key and value to the autocast dtype; keep float64.

    PyTorch's own attention does the same. `torch.library.register_autocast` would fix that dtype at import; the user
    chooses it at run time.
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
