"""MLR attention for CUDA GPUs in Triton: one pass over tiles, every product cut to the prefix it needs.

Kernels are in `forward_kernel`, `backward_kernels` and `decode_kernels`, what they share in `tiles`; Triton is imported
on first use. With `TRITON_INTERPRET=1` set before Python starts they run on the CPU, slowly and for tests alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy

MOST_RANK, MOST_VALUE_WIDTH = 1024, 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def ineligible(call: Call | None = None) -> str | None:
    """Why the kernels cannot serve `call`: no Triton, no CUDA, an old card, a dtype or a width."""
    if call is None:
        return ineligible_tensor(None)
    reason = ineligible_tensor(call.query)
    if reason is None and call.hierarchy.rank > MOST_RANK:
        reason = f"it serves query and key of at most {MOST_RANK} dimensions, got {call.hierarchy.rank}"
    return reason or _too_wide(call.value)


def ineligible_decode(query: Tensor, value: Tensor) -> str | None:
    """The same for a call of `mlr_decode`."""
    return ineligible_tensor(query) or _too_wide(value)


def ineligible_tensor(query: Tensor | None) -> str | None:
    """The same for a query alone, or for any on this machine if None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if query is not None and query.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, got {query.dtype}"
    if interpreted():
        return _ineligible_to_interpret(query)
    if query is not None and query.device.type != "cuda":
        return f"it serves tensors on CUDA devices, got {query.device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(None if query is None else query.device)
    if capability < (8, 0):
        return f"it serves compute capability 8.0 and up, got {capability[0]}.{capability[1]}"
    return None


def interpreted() -> bool:
    """Whether Triton was asked to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _ineligible_to_interpret(query: Tensor | None) -> str | None:
    if query is not None and query.device.type != "cpu":
        return f"TRITON_INTERPRET=1 is set, and the interpreter serves tensors on the CPU, got {query.device}"
    if query is not None and query.dtype == torch.bfloat16:
        return "TRITON_INTERPRET=1 is set, and the interpreter is wrong in bfloat16"
    return None


def _too_wide(value: Tensor) -> str | None:
    if value.shape[3] > MOST_VALUE_WIDTH:
        return f"it serves values of at most {MOST_VALUE_WIDTH} dimensions, got {value.shape[3]}"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, Tq, dv)` and log-sum-exp `(B, Hq, Tq)`, see `Backend`."""
    from structattn.ops.triton.forward_kernel import forward

    return forward(call)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, see `Backend`: no atomics, so a result does not depend on the run."""
    from structattn.ops.triton.backward_kernels import backward

    return backward(call, grad_out, out, lse, needs_bias_grad=needs_bias_grad)


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
    from structattn.ops.triton.decode_kernels import decode

    return decode(query, key_levels, value, hierarchy, key_length, level_starts, key_start, scale)
