"""MLR attention compiled for the CPU: one pass over tiles of keys that truncates every product to the prefix it needs.

The kernel's sources are in `csrc`, built on first use (`build`); float32 and bfloat16 are accumulated in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.cpu import build, library
from structattn.ops.hierarchy import Hierarchy

__all__ = ["backward", "decode", "forward", "ineligible", "ineligible_tensor"]


def ineligible(call: Call | None = None) -> str | None:
    """Why the kernel cannot serve `call`: its device, its dtype, or (where the kernel cannot be built) the compiler."""
    return ineligible_tensor(None if call is None else call.query)


def ineligible_tensor(query: Tensor | None) -> str | None:
    """The same for a call that this query stands for."""
    if query is not None:
        if query.device.type != "cpu":
            return f"it serves tensors on the CPU, got {query.device}"
        if query.dtype not in library.DTYPES:
            return f"it serves float32, bfloat16 and float16, got {query.dtype}"
    reason = build.failure()
    if reason is not None:
        _warn_once(reason)
    return reason


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, Tq, dv)` and log-sum-exp `(B, Hq, Tq)`, see `Backend`."""
    shape = call.query.shape[:3]
    out = call.query.new_empty(*shape, call.value.shape[3])
    lse = call.query.new_empty(shape, dtype=torch.float32)
    library.run("structattn_forward", library.call_struct(call, out, lse))
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, see `Backend`."""
    # The kernel writes what lies within the rows' ranges, and padding has no gradient.
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


def decode(
    query: Tensor,
    key_levels: Sequence[Tensor],
    value: Tensor,
    hierarchy: Hierarchy,
    key_length: int,
    level_starts: Sequence[int],
    key_start: Tensor | None,
    scale: float,
) -> Tensor:
    """Output `(B, Hq, Tq, dv)` of `structattn.ops.decode.mlr_decode`, whose arguments these are."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    # The kernel reads runs of positions: another layout is copied, at the price of reading it all.
    levels = [keys if keys.stride(3) == 1 else keys.contiguous() for keys in key_levels]
    struct = library.decode_struct(query, levels, value, out, hierarchy, key_length, level_starts, key_start, scale)
    library.run("structattn_decode", struct)
    return out


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"structattn: the compiled CPU kernel is not available, slower PyTorch code serves: {reason}")
