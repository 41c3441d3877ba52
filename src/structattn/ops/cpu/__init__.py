"""Compute MLR attention in compiled code on the CPU.

It makes one pass over tiles of keys and cuts each product to the prefix it needs. Sums are in float32 for every dtype.
The sources are in `csrc`. A wheel brings them compiled (`prebuilt`); elsewhere they are built on first use (`build`).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from structattn.ops import schema
from structattn.ops.call import Call, DecodeCall
from structattn.ops.cpu import library

__all__ = ["backward", "decode", "forward", "ineligible"]


def ineligible(call: Call | DecodeCall | None = None) -> str | None:
    """Return why the kernel cannot serve `call`, or None.

    Without a call, return why there is no kernel: no library for this machine, no compiler.
    """
    if call is not None:
        if call.query.device.type != "cpu":
            return f"it serves tensors on the CPU, got {call.query.device}"
        if call.query.dtype not in library.DTYPES:
            return f"it serves float32, bfloat16 and float16, got {call.query.dtype}"
    reason = library.failure()
    if reason is not None:
        _warn_once(reason)
    return reason


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`."""
    results: tuple[Tensor, Tensor] = torch.ops.structattn_cpu.attention(*_arguments(call))
    return results


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and bias, see `Backend`."""
    needs_bias_grad = needs_bias_grad and call.attn_bias is not None
    grads = torch.ops.structattn_cpu.attention_backward(grad_out, out, lse, needs_bias_grad, *_arguments(call))
    query, key, value, *rest = grads
    return query, key, value, rest[0] if rest else None


def decode(call: DecodeCall) -> Tensor:
    """Return the output `(B, Hq, Tq, dv)` of `mlr_decode`."""
    out: Tensor = torch.ops.structattn_cpu.decode(
        call.query,
        call.key_levels,
        call.value_levels,
        call.key_start,
        call.hierarchy.text,
        call.key_length,
        call.level_starts,
        call.scale,
    )
    return out


def _arguments(call: Call) -> tuple[object, ...]:
    return (*schema.tensors_of(call), *schema.options_of(call, "cpu")[:-1])


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"structattn: the compiled CPU kernel is not available, slower PyTorch code serves: {reason}")
