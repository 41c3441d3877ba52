"""Compute MLR attention on CUDA GPUs in Triton.

It makes one pass over tiles and cuts each product to the prefix it needs. The kernels are in `forward_kernel`,
`backward_kernels` and `decode_kernels`; they share `tiles`. Triton is imported on first use.

With `TRITON_INTERPRET=1` set before Python starts, kernels run on the CPU: slowly, for tests only.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from structattn.ops.call import Call, DecodeCall

MOST_RANK, MOST_VALUE_WIDTH = 1024, 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def ineligible(call: Call | DecodeCall | None = None) -> str | None:
    """Return why the kernels cannot serve `call`, or None.

    Without a call, return why they serve none on this machine.
    """
    query = None if call is None else call.query
    reason = _ineligible_query(query)
    if reason is not None or call is None:
        return reason
    if isinstance(call, Call) and call.hierarchy.rank > MOST_RANK:
        return f"it serves query and key of at most {MOST_RANK} dimensions, got {call.hierarchy.rank}"
    width = call.value_dim
    if width > MOST_VALUE_WIDTH:
        return f"it serves values of at most {MOST_VALUE_WIDTH} dimensions, got {width}"
    return None


def _ineligible_query(query: Tensor | None) -> str | None:
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
    """Return True if Triton was asked to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _ineligible_to_interpret(query: Tensor | None) -> str | None:
    if query is not None and query.device.type != "cpu":
        return f"TRITON_INTERPRET=1 is set, and the interpreter serves tensors on the CPU, got {query.device}"
    if query is not None and query.dtype == torch.bfloat16:
        return "TRITON_INTERPRET=1 is set, and the interpreter is wrong in bfloat16"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`."""
    from structattn.ops.triton.forward_kernel import forward

    return forward(call)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients, see `Backend`, the same in every run."""
    from structattn.ops.triton.backward_kernels import backward

    return backward(call, grad_out, out, lse, needs_bias_grad=needs_bias_grad)


def decode(call: DecodeCall) -> Tensor:
    """Return the output `(B, Hq, Tq, dv)` of `mlr_decode`."""
    from structattn.ops.triton.decode_kernels import decode

    return decode(call)
