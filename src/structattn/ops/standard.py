"""Choose between PyTorch's kernels and `mlr_attention` for standard attention."""

from __future__ import annotations

import functools
import platform
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from structattn import checks
from structattn.ops import torch_internals
from structattn.ops.attention import mlr_attention
from structattn.ops.cpu import library
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan

StandardKernel = Literal["auto", "torch", "compiled"]
"""Kernel of standard attention.

`"torch"` is `F.scaled_dot_product_attention` wherever one of its fused kernels serves the call. `"compiled"` is this
package's: C++ on a CPU, Triton on a CUDA device. `"auto"` takes the faster one, see `faster_kernel`."""

# Shortest queries and keys from which the compiled kernel is faster, by dtype, training and causal masking. Calls
# that are missing stay with PyTorch. `python -m benchmarks.standard_kernel` measures it.
_FASTER_FROM = {
    (torch.float32, False, True): 256,
    (torch.float32, True, True): 256,
    (torch.bfloat16, True, True): 128,
    (torch.bfloat16, True, False): 128,
}


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: KeySpan = UNPADDED,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kernel: StandardKernel = "auto",
) -> Tensor:
    """Compute softmax attention over all of `r`.

    PyTorch's kernels serve neither padding nor an offset without a `T x T` mask. On a CPU they serve neither `r != dv`
    nor dropout without keeping all scores in memory (at `T = 1024`, 32 against 64 wide, forward and backward took 2.1
    times as long as the op). Such calls go to `mlr_attention`, whatever `kernel` is.

    Args:
        query: `(B, Hq, Tq, r)`.
        key: `(B, Hkv, Tk, r)`; `Hkv` divides `Hq`.
        value: `(B, Hkv, Tk, dv)`.
        span: valid keys of each row and offset of the queries.
        is_causal: as in `mlr_attention`.
        scale: factor on every score; `1/sqrt(r)` by default.
        dropout_p: as in `mlr_attention`.
        kernel: see `StandardKernel`.

    Returns:
        `(B, Hq, Tq, dv)`.

    Raises:
        ValueError: `kernel` is unknown, or `"compiled"` and cannot serve the call; the message says why.
    """
    checks.one_of("kernel", kernel, get_args(StandardKernel))
    unserved_on_cpu = query.device.type == "cpu" and (query.shape[-1] != value.shape[-1] or dropout_p > 0)
    # A plain bool: PyTorch's attention takes nothing else, and under a compiler sizes are symbols.
    grouped = True if key.shape[1] != query.shape[1] else False  # noqa: SIM210
    offset = span.query_offset
    if is_causal and not span.is_padded and query.shape[2] == 1 and offset == key.shape[2] - 1:
        is_causal, offset = False, 0  # the last query sees every key
    if not (span.is_padded or unserved_on_cpu or offset):
        if kernel == "auto":
            kernel = faster_kernel(query, key, value, is_causal=is_causal)
        if kernel == "torch":
            return F.scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=grouped
            )
    return mlr_attention(
        query,
        key,
        value,
        Hierarchy.flat(query.shape[-1]),
        is_causal=is_causal,
        scale=scale,
        key_start=span.key_start,
        key_end=span.key_end,
        query_offset=offset,
        enable_gqa=grouped,
        dropout_p=dropout_p,
        backend=_compiled_backend(query) if kernel == "compiled" else "auto",
    )


def faster_kernel(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Literal["torch", "compiled"]:
    """Return the faster kernel for a call that both serve.

    It is the compiled one on an x86-64 CPU with AVX2 where it has been measured to be faster: long calls, causal in
    float32 or in training in bfloat16, with a key head for each query head, and a head for each thread. PyTorch's
    serves where there is no compiled kernel, under a compiler and under transforms.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling() or not _is_plain(query, key, value):
        return "torch"
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    shortest = _FASTER_FROM.get((_dtype(query), training, is_causal))
    if shortest is None or min(query.shape[2], key.shape[2]) < shortest:
        return "torch"
    if query.shape[1] != key.shape[1] or query.shape[0] * query.shape[1] < torch.get_num_threads():
        return "torch"
    return "compiled" if _has_measured_kernel() else "torch"


def _compiled_backend(query: Tensor) -> str:
    """Return the name of the compiled backend of the query's device."""
    backends = {"cpu": "cpu", "cuda": "triton"}
    if query.device.type not in backends:
        raise ValueError(f"kernel 'compiled' needs tensors on a CPU or a CUDA device, got {query.device}")
    return backends[query.device.type]


def _is_plain(*tensors: Tensor) -> bool:
    """Return True if no transform, tracer or subclass watches PyTorch's operator."""
    return (
        all(type(tensor) is Tensor for tensor in tensors)
        and not torch.jit.is_tracing()
        and not torch_internals.may_be_transformed()
        and not torch_internals.has_tangent(tensors)
    )


def _dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of the products, or of autocast where on."""
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return query.dtype


@functools.lru_cache(maxsize=1)
def _has_measured_kernel() -> bool:
    """Return True if the kernel runs, on processors like those measured.

    A missing compiler gives no warning here: PyTorch's kernel serves as before.
    """
    measured = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return measured and library.failure() is None
