"""Flatten a call for an operator of `torch.library`.

Operators take tensors and plain numbers only.

The arguments of both operators of attention are the tensors in `TENSORS`, then the options in `OPTIONS`; those of
decode end with a hierarchy and numbers of its own (`structattn.ops.decode`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy

HIERARCHY = "int[] ranks, int[] sizes, bool by_window, float[] gains, int[]? value_ranks"
TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed"
OPTIONS = f"{HIERARCHY}, bool is_causal, float scale, SymInt query_offset, float dropout_p, str backend"
TENSOR_COUNT = len(TENSORS.split(", "))
ARGUMENT_COUNT = TENSOR_COUNT + len(OPTIONS.split(", "))


def tensors_of(call: Call) -> tuple[Tensor | None, ...]:
    """Return the tensors of a call in the order of `TENSORS`."""
    return (call.query, call.key, call.value, call.attn_bias, call.key_start, call.key_end, call.seed)


def options_of(call: Call, backend: str) -> tuple[Any, ...]:
    """Return everything else in the order of `OPTIONS`."""
    numbers = pack_hierarchy(call.hierarchy)
    return (*numbers, call.is_causal, call.scale, call.query_offset, call.dropout_p, backend)


def unpack(arguments: Sequence[Any]) -> tuple[Call, str]:
    """Return the call and the backend's name from an operator's arguments."""
    query, key, value, bias, start, end, seed = arguments[:TENSOR_COUNT]
    *numbers, is_causal, scale, query_offset, dropout_p, backend = arguments[TENSOR_COUNT:]
    hierarchy = unpack_hierarchy(*numbers)
    call = Call(query, key, value, bias, start, end, seed, hierarchy, is_causal, scale, query_offset, dropout_p)
    return call, backend


def pack_hierarchy(hierarchy: Hierarchy) -> tuple[list[int], list[int], bool, list[float], list[int] | None]:
    """Return a hierarchy's numbers in the order of `HIERARCHY`; a size of 0 is the whole sequence."""
    sizes = [size or 0 for size in hierarchy.sizes]
    value_ranks = None if hierarchy.value_ranks is None else list(hierarchy.value_ranks)
    return list(hierarchy.ranks), sizes, hierarchy.by_window, list(hierarchy.gains), value_ranks


def unpack_hierarchy(
    ranks: Sequence[int],
    sizes: Sequence[int],
    by_window: bool,
    gains: Sequence[float],
    value_ranks: Sequence[int] | None,
) -> Hierarchy:
    """Return the hierarchy that `pack_hierarchy` packed."""
    values = None if value_ranks is None else tuple(value_ranks)
    return _hierarchy(tuple(ranks), tuple(sizes), by_window, tuple(gains), values)


@functools.lru_cache(maxsize=256)  # every call asks for it
def _hierarchy(
    ranks: tuple[int, ...],
    sizes: tuple[int, ...],
    by_window: bool,
    gains: tuple[float, ...],
    value_ranks: tuple[int, ...] | None,
) -> Hierarchy:
    reach = [size or None for size in sizes]
    blocks, windows = (None, reach) if by_window else (reach, None)
    return Hierarchy(ranks, blocks, gains, windows=windows, value_ranks=value_ranks)


def pad_with_none(grads: Sequence[Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    """Return `count` gradients: those given, then None for the arguments that have none."""
    return (*grads, *(None,) * (count - len(grads)))
