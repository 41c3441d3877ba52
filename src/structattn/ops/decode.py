"""Attend from the newest queries to a cache kept by level.

One query reads each key once, so the speed of memory decides. A level's keys are stored dimension-major, `(r_l, T)`: a
run of positions is then one stream for each dimension that counts there, and no other dimension is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from structattn import checks
from structattn.ops import cpu, schema, torch_internals, triton
from structattn.ops.arguments import check_hierarchy, check_key_bound, check_operand
from structattn.ops.call import DecodeCall
from structattn.ops.cpu import library
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.operator import may_run_in_cpp

_BACKENDS = ("auto", "cpu", "triton", "dense")


def mlr_decode(
    query: Tensor,
    key_levels: Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    hierarchy: Hierarchy,
    *,
    key_length: int,
    level_starts: Sequence[int] | None = None,
    key_start: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Compute causal MLR attention of the last tokens, from a cache.

    The queries are the last `Tq` of `key_length` tokens (arXiv 2509.07963, section 4).

    Query `i` stands at index `key_length - Tq + i` and gives what `mlr_attention(..., is_causal=True)` gives it, with
    the score summed level by level over the keys that each level reaches, and value dimensions mixed likewise::

        score(i, j) = scale · c_m · Σ_{l <= m(i, j)} q_i^l · k_j^l

    No later query shares level `l` with a key before the current block or window of that level, so the buffers of the
    level may start there. There is no gradient: this is for generation.

    Args:
        query: `(B, Hq, Tq, r)`, float16, bfloat16, float32 or float64.
        key_levels: for each level, `(B, Hkv, r_l, capacity_l)`, same dtype: column `c` is the key at index
            `level_starts[l] + c`. Columns from `key_length` on are never used.
        value: for each level, `(B, Hkv, capacity_l, u_l)`, same dtype: row `c` is the value at index `level_starts[l] +
            c`. Rows from `key_length` on are never used. Where level 1 owns all value dimensions, one tensor will do.
        hierarchy: the levels; its ranks sum to `r`.
        key_length: tokens in the cache, those of the queries included.
        level_starts: index of the first key and value in each level's buffers; 0 for each by default.
        key_start: `(B,)` integers, the first valid key of each row; positions count from it.
        scale: factor on every score; `1/sqrt(r)` by default.
        enable_gqa: allow `Hkv < Hq` (it must divide).
        backend: `"auto"`, `"cpu"` (the compiled kernel), `"triton"` (for CUDA) or `"dense"` (PyTorch).

    Returns:
        `(B, Hq, Tq, dv)` in the query's dtype; zeros for a query before its row's first valid key.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    tensors = (query, key_levels, value, key_start)
    out = _decode_in_cpp(tensors, hierarchy, key_length, level_starts, scale, enable_gqa, backend)
    if out is not None:
        return out
    checks.one_of("backend", backend, _BACKENDS)
    check_operand("query", query)
    check_hierarchy(hierarchy, query)
    _check_sinks(hierarchy)
    starts = [0] * hierarchy.levels if level_starts is None else list(level_starts)
    key_start = check_key_bound("key_start", key_start, query)
    scale = 1 / math.sqrt(hierarchy.rank) if scale is None else checks.finite("scale", scale)
    values = _value_levels(value, hierarchy)
    call = DecodeCall(query, list(key_levels), values, key_start, hierarchy, key_length, starts, scale)
    _check_shapes(call, enable_gqa)
    given = (call.query, *call.key_levels, *call.value_levels, call.key_start)
    if torch_internals.is_plain(given) and not torch_internals.need_grad(given):
        return _run(call, backend)  # dispatch through Python costs more than a step near the start of a text
    result: Tensor = torch.ops.structattn.mlr_decode(*_pack(call), backend)
    return result


def _decode_in_cpp(
    tensors: tuple[Tensor, Sequence[Tensor], Tensor | Sequence[Tensor], Tensor | None],
    hierarchy: Hierarchy,
    key_length: int,
    level_starts: Sequence[int] | None,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> Tensor | None:
    """Run a call in C++ as `operator.attend_in_cpp` does, or return None."""
    if not may_run_in_cpp(hierarchy, key_length, backend):
        return None
    query, key_levels, value, key_start = tensors
    try:
        value_levels = [value] if isinstance(value, Tensor) else value
        given = (query, *key_levels, *value_levels)
        if (
            not torch_internals.all_plain((*given, key_start))
            or not all(tensor.is_cpu for tensor in given)
            or not (key_start is None or key_start.is_cpu)
            or query.dtype not in library.DTYPES
            or len(value_levels) != (1 if isinstance(value, Tensor) else hierarchy.levels)
            or not (enable_gqa or value_levels[0].size(1) == query.size(1))
            or (not library.state.differentiates and torch_internals.need_grad(given))
        ):
            return None
        scale = 1 / math.sqrt(hierarchy.rank) if scale is None else checks.finite("scale", scale)
        starts = [0] * hierarchy.levels if level_starts is None else level_starts
        operator = torch.ops.structattn.mlr_decode.default
        with nullcontext() if library.state.differentiates else torch_internals.below_autograd():
            out: Tensor = operator(
                query, key_levels, value_levels, key_start, hierarchy.text, key_length, starts, scale, backend
            )
            return out
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def _value_levels(value: Tensor | Sequence[Tensor], hierarchy: Hierarchy) -> list[Tensor]:
    """Return each level's values, of width 0 where it owns none."""
    if not isinstance(value, Tensor):
        return list(value)
    check_operand("value", value)
    hierarchy.value_widths(value.shape[3])
    if any((hierarchy.value_ranks or ())[1:]):
        raise ValueError(f"value must be one tensor for each of {hierarchy.levels} levels, got one alone")
    return [value, *(value[..., :0],) * (hierarchy.levels - 1)]


def dense(call: DecodeCall) -> Tensor:
    """Define `mlr_decode` in dense PyTorch, in `O(Tq · key_length)` memory per head."""
    query, hierarchy, key_length = call.query, call.hierarchy, call.key_length
    batch, heads, queries, _ = query.shape
    group = heads // call.value_levels[0].shape[1]
    zero = torch.zeros(1, dtype=torch.int64, device=query.device)
    start = (zero if call.key_start is None else call.key_start).view(-1, 1, 1, 1)
    i = torch.arange(key_length - queries, key_length, device=query.device)[:, None] - start
    j = torch.arange(key_length, device=query.device) - start
    visible = (j >= 0) & (j <= i) & hierarchy.reaches(0, i, j)
    reached = [visible & hierarchy.reaches(level, i, j) for level in range(hierarchy.levels)]
    score = query.new_zeros(batch, heads, queries, key_length)
    levels = zip(query.split(hierarchy.ranks, -1), call.key_levels, reached, call.level_starts, strict=True)
    for q, keys, reaches, first in levels:
        live = keys[..., : key_length - first].repeat_interleave(group, dim=1)
        score[..., first:] += (q @ live).masked_fill(~reaches[..., first:], 0.0)
    gains = torch.tensor(hierarchy.gains, dtype=query.dtype, device=query.device)
    depth = hierarchy.depth(i, j).clamp(min=1)  # pairs that no level reaches are invisible
    score = (score * (call.scale * gains[depth - 1])).masked_fill(~visible, -torch.inf)
    no_keys_visible = ~visible.any(-1, keepdim=True)
    probability = torch.softmax(score.masked_fill(no_keys_visible, 0.0), -1).masked_fill(no_keys_visible, 0.0)
    mixed = [
        (probability * reaches)[..., first:] @ values[:, :, : key_length - first].repeat_interleave(group, dim=1)
        for values, reaches, first in zip(call.value_levels, reached, call.level_starts, strict=True)
    ]
    return torch.cat(mixed, -1)


def _check_shapes(call: DecodeCall, enable_gqa: bool) -> None:
    """Check that tensors fit query, hierarchy and `key_length`. Raise TypeError or ValueError."""
    query, hierarchy, key_length = call.query, call.hierarchy, call.key_length
    counts = {"key_levels": call.key_levels, "value": call.value_levels, "level_starts": call.level_starts}
    for name, each in counts.items():
        if len(each) != hierarchy.levels:
            raise ValueError(f"{name} must have one entry per level ({hierarchy.levels}), got {len(each)}")
    names = [f"{name}[{level}]" for name in ("key_levels", "value") for level in range(hierarchy.levels)]
    for name, tensor in zip(names, [*call.key_levels, *call.value_levels], strict=True):
        check_operand(name, tensor)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name} must be {query.dtype} on {query.device} as the query is, got {tensor.dtype} on {tensor.device}"
            )
    batch, heads, queries, _ = query.shape
    key_heads = call.value_levels[0].shape[1]
    if not queries <= key_length:
        raise ValueError(f"key_length must be at least Tq = {queries}, got {key_length}")
    grouped = key_heads and heads % key_heads == 0 and (enable_gqa or key_heads == heads)
    if call.value_levels[0].shape[0] != batch or not grouped:
        raise ValueError(
            f"value must be (B, Hkv, capacity, dv) with B = {batch} and Hkv = {heads} (or, with enable_gqa=True, a "
            f"divisor of it), got {tuple(call.value_levels[0].shape)}"
        )
    width_of_all = call.value_levels[0].shape[3] if hierarchy.value_ranks is None else call.value_dim
    value_widths = hierarchy.value_widths(width_of_all)
    each_level = zip(call.key_levels, call.value_levels, hierarchy.ranks, value_widths, call.level_starts, strict=True)
    for level, (keys, values, rank, width, first) in enumerate(each_level):
        needed = key_length - first
        if keys.shape[:3] != (batch, key_heads, rank) or keys.shape[3] < needed:
            raise ValueError(
                f"key_levels[{level}] must be (B, Hkv, r_l, capacity) = ({batch}, {key_heads}, {rank}, at least "
                f"key_length - {first} = {needed}), got {tuple(keys.shape)}"
            )
        if values.shape[:2] != (batch, key_heads) or values.shape[3] != width or (width and values.shape[2] < needed):
            raise ValueError(
                f"value[{level}] must be (B, Hkv, capacity, u_l) = ({batch}, {key_heads}, at least key_length - "
                f"{first} = {needed}, {width}), got {tuple(values.shape)}"
            )


def _check_starts(call: DecodeCall) -> None:
    """Raise ValueError unless buffers hold all that the first query reads.

    It reads numbers, so it runs inside the operator. Numbers on an accelerator are not read: waiting for them would
    stall it at every token.
    """
    if call.key_start is not None and call.key_start.device.type != "cpu":
        return
    key_length, queries = call.key_length, call.query.shape[2]
    for row, start in enumerate([0] if call.key_start is None else call.key_start.tolist()):
        if not 0 <= start <= key_length:
            raise ValueError(f"key_start must be between 0 and key_length = {key_length}, got {start} in row {row}")
        position = max(key_length - queries - start, 0)
        for level, first in enumerate(call.level_starts):
            needed = start + max(call.hierarchy.span(level, position)[0], 0)
            if not 0 <= first <= needed:
                raise ValueError(
                    f"level_starts[{level}] must be between 0 and {needed}, the first key that the level reaches from "
                    f"the first query, got {first} in row {row}"
                )


def _pack(call: DecodeCall) -> tuple[Any, ...]:
    """Return the operator's arguments, all but the backend, see `_ARGUMENTS`."""
    tensors = (call.query, call.key_levels, call.value_levels, call.key_start)
    return (*tensors, call.hierarchy.text, call.key_length, call.level_starts, call.scale)


def _decode(*args: Any) -> Tensor:
    query, key_levels, value_levels, key_start, text, key_length, level_starts, scale, backend = args
    hierarchy = schema.hierarchy_of(text)
    if len(value_levels) == 1:
        value_levels = _value_levels(value_levels[0], hierarchy)
    call = DecodeCall(query, key_levels, value_levels, key_start, hierarchy, key_length, level_starts, scale)
    return _run(call, backend)


def _check_sinks(hierarchy: Hierarchy) -> None:
    """Raise ValueError where there are sinks: levels are all that the buffers hold."""
    if hierarchy.sinks:
        raise ValueError(
            f"hierarchy must have no sinks, got {hierarchy}: mlr_decode reads levels alone; a layer's cache "
            "(structattn.layers.kv_cache) serves sinks"
        )


def _run(call: DecodeCall, backend: str) -> Tensor:
    """Return the output, for direct and registered calls alike."""
    _check_sinks(call.hierarchy)
    _check_starts(call)
    return _choose(backend, call)(call)


def _choose(backend: str, call: DecodeCall) -> Callable[[DecodeCall], Tensor]:
    """Return the decoder of that name, or raise ValueError with its reason.

    `"auto"` is the compiled decoder of the device, or `dense` where that cannot serve.
    """
    name = backend if backend != "auto" else "triton" if call.query.is_cuda else "cpu"
    if name == "dense":
        return dense
    module = triton if name == "triton" else cpu
    reason = module.ineligible(call)
    if reason is None:
        return module.decode
    if backend != "auto":
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return dense


def _decode_fake(query: Tensor, key_levels: Sequence[Tensor], value_levels: Sequence[Tensor], *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], sum(values.shape[3] for values in value_levels))


_ARGUMENTS = (
    "Tensor query, Tensor[] key_levels, Tensor[] value_levels, Tensor? key_start, str hierarchy, SymInt key_length, "
    "SymInt[] level_starts, float scale, str backend"
)
torch.library.custom_op(
    "structattn::mlr_decode", _decode, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
).register_fake(_decode_fake)
_LIBRARY = torch.library.Library("structattn", "FRAGMENT")
_LIBRARY.define(f"mlr_decode_in_python({_ARGUMENTS}) -> Tensor[]")
_LIBRARY.impl("mlr_decode_in_python", schema.in_python(_decode), "CompositeExplicitAutograd")
