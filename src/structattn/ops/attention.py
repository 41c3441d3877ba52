"""MLR attention, the face: checks, and the operator that autograd, autocast, compilers and FLOP counters see.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv), output (B, Hq, Tq, dv).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structattn import checks
from structattn.ops import registry
from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mlr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hierarchy: Hierarchy,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_offset: int = 0,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention whose dot product shortens with distance (arXiv 2509.07963, section 4).

    With depth `m = m(i, j)` and prefix rank `R_m` of the hierarchy::

        score(i, j) = scale · c_m · Σ_{d < R_m} q_i[d] · k_j[d] + attn_bias(i, j)
        out_i       = Σ_j softmax_j(score(i, ·)) v_j

    `Hierarchy.flat(r)` is `torch.nn.functional.scaled_dot_product_attention`, whose argument names are used here.
    A query that sees no key, or stands before its row's first valid key, gives zeros and zero gradients.

    Args:
        query: `(B, Hq, Tq, r)`, float16, bfloat16, float32 or float64.
        key: `(B, Hkv, Tk, r)`, same dtype.
        value: `(B, Hkv, Tk, dv)`, same dtype; `dv` may differ from `r`.
        hierarchy: the levels; its ranks sum to `r`.
        is_causal: whether query `i` sees only keys `j <= query_offset + i`.
        scale: factor on every score; `1/sqrt(r)` by default.
        attn_bias: added to the scores; a float tensor broadcastable to `(B, Hq, Tq, Tk)`, of the query's dtype or
            float32; `-inf` masks a pair. It receives a gradient where it requires one.
        key_start: `(B,)` integers, the first valid key of each row. Positions count from it, so a left-padded row gives
            what it gives unpadded.
        key_end: `(B,)` integers, one past the last valid key of each row.
        query_offset: index of the first query among the keys: a chunk of queries against a longer row of keys.
        enable_gqa: allow `Hkv < Hq` (it must divide): query head `h` reads key head `h // (Hq / Hkv)`.
        dropout_p: share of probabilities to drop, the rest scaled by `1/(1 - dropout_p)`. The mask is drawn from the
            default generator's state (`torch.manual_seed`).
        backend: `"auto"`, or a name from `structattn.ops.backends()`.

    Returns:
        `(B, Hq, Tq, dv)` in the query's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also where a named backend cannot
            serve the call.
    """
    registry.check_name(backend)
    check_tensors(query, key, value, enable_gqa=enable_gqa)
    _check_hierarchy(hierarchy, query)
    query_length, rank = query.shape[2:]
    key_length = key.shape[2]
    if not 0 <= query_offset <= max(key_length - query_length, 0):
        raise ValueError(
            f"query_offset must be between 0 and {max(key_length - query_length, 0)} (Tk - Tq), so that no query "
            f"stands past the keys; got {query_offset} with Tq = {query_length}, Tk = {key_length}"
        )
    bias = None if attn_bias is None else _four_axes(attn_bias, query, key_length)
    start, end = check_key_bound("key_start", key_start, query), check_key_bound("key_end", key_end, query)
    seed = None
    if checks.probability("dropout_p", dropout_p) > 0:
        seed = torch.randint(2**62, (), device=query.device)
    scale = 1 / math.sqrt(rank) if scale is None else checks.finite("scale", scale)
    tensors = (query, key, value, bias, start, end, seed)
    sizes = [size or 0 for size in hierarchy.block_sizes]
    choices = (
        list(hierarchy.ranks),
        sizes,
        list(hierarchy.gains),
        is_causal,
        scale,
        query_offset,
        dropout_p,
        backend,
    )
    return torch.ops.structattn.mlr_attention(*tensors, *choices)[0]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_tensors(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
    """Four axes, floating, one dtype and device, shapes that fit; TypeError or ValueError naming the argument."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four axes (B, H, T, width), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
        # Under autocast the operator brings all three to one dtype.
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
    (batch, heads, _, rank), (_, key_heads, _, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != rank:
        raise ValueError(
            f"key must have the query's batch and width: expected (B, Hkv, Tk, r) = ({batch}, Hkv, Tk, {rank}), "
            f"got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, Hkv, Tk, dv) as key is {tuple(key.shape)}, got {tuple(value.shape)}")
    if key_heads != heads and not enable_gqa:
        raise ValueError(f"key must have the query's {heads} heads unless enable_gqa=True, got {key_heads}")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key heads must divide the query's {heads} heads, got {key_heads}")


def _check_hierarchy(hierarchy: Hierarchy, query: Tensor) -> None:
    if not isinstance(hierarchy, Hierarchy):
        raise TypeError(f"hierarchy must be a structattn.Hierarchy, got {type(hierarchy).__name__}")
    if hierarchy.rank != query.shape[3]:
        raise ValueError(
            f"hierarchy's ranks must sum to the query's width {query.shape[3]}, "
            f"got {'|'.join(map(str, hierarchy.ranks))} = {hierarchy.rank}"
        )


def _four_axes(bias: Tensor, query: Tensor, key_length: int) -> Tensor:
    """`bias` as `(B or 1, Hq or 1, Tq or 1, Tk or 1)`."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a tensor, got {type(bias).__name__}")
    if bias.dtype not in (query.dtype, torch.float32) and not torch.is_autocast_enabled(query.device.type):
        hint = "; turn a mask into a bias by torch.where(mask, 0.0, -torch.inf)" if bias.dtype == torch.bool else ""
        raise TypeError(f"attn_bias must be {query.dtype} or torch.float32, got {bias.dtype}{hint}")
    if bias.device != query.device:
        raise ValueError(f"attn_bias must be on the query's device {query.device}, got {bias.device}")
    shape = (*query.shape[:3], key_length)
    wide = bias[(None,) * (4 - bias.dim())] if bias.dim() <= 4 else bias
    if wide.dim() != 4 or any(have not in (1, want) for have, want in zip(wide.shape, shape, strict=True)):
        raise ValueError(f"attn_bias must broadcast to (B, Hq, Tq, Tk) = {shape}, got {tuple(bias.shape)}")
    return wide


def check_key_bound(name: str, bound: Tensor | None, query: Tensor) -> Tensor | None:
    """`bound` as int64 `(B,)` for a query (or any tensor that leads with B), shape, dtype and device checked."""
    if bound is None:
        return None
    if not isinstance(bound, Tensor) or bound.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(bound, 'dtype', type(bound).__name__)}")
    if bound.shape != query.shape[:1]:
        raise ValueError(f"{name} must have one entry per row, ({query.shape[0]},), got {tuple(bound.shape)}")
    if bound.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {bound.device}")
    return bound.to(torch.int64)


def check_key_bounds(start: Tensor | None, end: Tensor | None, key_length: int) -> None:
    """0 <= key_start <= key_end <= Tk in every row: inside the operator, since it reads the numbers.

    An accelerator checks by itself, later, with a device-side assertion: to wait for its numbers would stall it.
    """
    some = start if start is not None else end
    if some is None:
        return
    start = torch.zeros_like(some) if start is None else start
    end = torch.full_like(some, key_length) if end is None else end
    valid = (start >= 0) & (start <= end) & (end <= key_length)
    if valid.device.type != "cpu":
        torch._assert_async(valid.all())
    elif not valid.all():
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"expected 0 <= key_start <= key_end <= Tk = {key_length} in every row, "
            f"got key_start = {int(start[row])}, key_end = {int(end[row])} in row {row}"
        )


# --- the operator -----------------------------------------------------------------------------------------------------

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed"
_CHOICES = (
    "int[] ranks, int[] block_sizes, float[] gains, bool is_causal, float scale, SymInt query_offset, "
    "float dropout_p, str backend"
)


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
