"""Compute MLR attention in compiled code on the CPU.

It makes one pass over tiles of keys and cuts each product to the prefix it needs.

The sources are in `csrc` and are built on first use (`build`). Sums are in float32 for every dtype.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from structattn.ops.call import Call, DecodeCall
from structattn.ops.cpu import build, library

__all__ = ["backward", "decode", "forward", "ineligible"]


def ineligible(call: Call | DecodeCall | None = None) -> str | None:
    """Return why the kernel cannot serve `call` (or any call, if None): device, dtype, or a missing compiler."""
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
    """Return output and log-sum-exp, see `Backend`."""
    shape = call.query.shape[:3]
    out = call.query.new_empty(*shape, call.value.shape[3])
    lse = call.query.new_empty(shape, dtype=torch.float32)
    library.run("structattn_forward", library.call_struct(call, out, lse))
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and bias, see `Backend`."""
    # The kernel writes only the valid range of each row; padding has gradient 0.
    padded = call.key_start is not None or call.key_end is not None or call.query.shape[2] == 0
    query, key, value = (
        tensor.new_zeros(tensor.shape) if padded else tensor.new_empty(tensor.shape)
        for tensor in (call.query, call.key, call.value)
    )
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        # Each head adds to a slice of its own, since threads take heads.
        batch, _, rows, columns = call.attn_bias.shape
        bias_grad = call.query.new_zeros(batch, call.query.shape[1], rows, columns, dtype=torch.float32)
    lse = lse.contiguous()
    struct = library.call_struct(call, out, lse)
    library.run("structattn_backward", struct, library.gradients_struct(call, grad_out, query, key, value, bias_grad))
    if bias_grad is not None and call.attn_bias is not None:
        bias_grad = bias_grad.sum_to_size(call.attn_bias.shape).to(call.attn_bias.dtype)
    return query, key, value, bias_grad


def decode(call: DecodeCall) -> Tensor:
    """Return the output `(B, Hq, Tq, dv)` of `mlr_decode`."""
    out = call.query.new_empty(*call.query.shape[:3], call.value_dim)
    # The kernel reads runs of positions: another layout is copied, at the price of reading it all.
    levels = [keys if keys.stride(3) == 1 else keys.contiguous() for keys in call.key_levels]
    library.run("structattn_decode", library.decode_struct(call, levels, call.value_levels, out))
    return out


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"structattn: the compiled CPU kernel is not available, slower PyTorch code serves: {reason}")
