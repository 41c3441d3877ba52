"""MLR attention compiled for the CPU: one pass over tiles of keys that truncates every product to the prefix it needs.

The kernel's sources are in `csrc`, built on first use (`build`); float32 and bfloat16 are accumulated in float32.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.cpu import build, library

__all__ = ["backward", "forward", "ineligible"]


def ineligible(call: Call | None = None) -> str | None:
    """Why the kernel cannot serve `call`: its device, its dtype, or (where the kernel cannot be built) the compiler."""
    if call is not None:
        if call.query.device.type != "cpu":
            return f"it serves tensors on the CPU, got {call.query.device}"
        if call.query.dtype not in library.DTYPES:
            return f"it serves float32, bfloat16 and float16, got {call.query.dtype}"
    reason = build.failure()
    if reason is not None:
        _warn_once(reason)
    return reason


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, Tq, dv)` and log-sum-exp `(B, Hq, Tq)`, see `Backend`."""
    shape = call.query.shape[:3]
    out = call.query.new_empty(*shape, call.value.shape[3])
    lse = torch.empty(shape, dtype=torch.float32)
    call = _dense_bounds(call)
    library.run("structattn_forward", library.call_struct(call, out, lse))
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, see `Backend`."""
    # The kernel writes what lies within the rows' ranges, and padding has no gradient.
    padded = call.key_start is not None or call.key_end is not None or call.query.shape[2] == 0
    make = torch.zeros if padded else torch.empty
    query, key, value = (make(tensor.shape, dtype=tensor.dtype) for tensor in (call.query, call.key, call.value))
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        # Each head adds to a slice of its own, since threads take heads.
        batch, _, rows, columns = call.attn_bias.shape
        bias_grad = torch.zeros(batch, call.query.shape[1], rows, columns)
    call, lse = _dense_bounds(call), lse.contiguous()
    struct = library.call_struct(call, out, lse)
    library.run("structattn_backward", struct, library.gradients_struct(call, grad_out, query, key, value, bias_grad))
    if bias_grad is not None and call.attn_bias is not None:
        bias_grad = bias_grad.sum_to_size(call.attn_bias.shape).to(call.attn_bias.dtype)
    return query, key, value, bias_grad


def _dense_bounds(call: Call) -> Call:
    """`call` with the ranges of keys as the kernel reads them, one number after another."""
    if call.key_start is None and call.key_end is None:
        return call
    start, end = (None if bound is None else bound.contiguous() for bound in (call.key_start, call.key_end))
    return replace(call, key_start=start, key_end=end)


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"structattn: the compiled CPU kernel is not available, slower PyTorch code serves: {reason}")
