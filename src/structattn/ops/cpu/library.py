"""Declare the compiled library's functions and the structures of a call.

The structures are those of csrc/call.h and csrc/decode.h; `check_layout` compares the two when the library is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from structattn.ops.call import Call, DecodeCall
from structattn.ops.cpu import build
from structattn.ops.hierarchy import Hierarchy

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MESSAGE_BYTES = 1024
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class View(ctypes.Structure):
    """A tensor of four axes; strides in elements."""

    _fields_ = [("data", _POINTER), ("dtype", _INT), ("stride", _INT * 4)]


class CallStruct(ctypes.Structure):
    """The arguments of a call."""

    _fields_ = [
        *((name, View) for name in ("query", "key", "value", "bias", "out")),
        *((name, _POINTER) for name in ("lse", "key_start", "key_end", "ranks", "sizes", "value_widths", "gains")),
        *((name, _INT) for name in ("batch", "heads", "key_heads", "query_length", "key_length", "rank")),
        *((name, _INT) for name in ("value_width", "levels", "by_window", "query_offset", "is_causal", "seed")),
        *((name, _FLOAT) for name in ("scale", "dropout_p")),
    ]


class Gradients(ctypes.Structure):
    """The further tensors of a backward call: the output's gradient, and the gradients it writes."""

    _fields_ = [(name, View) for name in ("grad_out", "query", "key", "value", "bias")]


class DecodeStruct(ctypes.Structure):
    """The arguments of a call of decode (csrc/decode.h)."""

    _fields_ = [
        *((name, View) for name in ("query", "out")),
        *((name, ctypes.POINTER(View)) for name in ("key_levels", "value_levels")),
        *((name, _POINTER) for name in ("level_starts", "key_start", "ranks", "sizes", "value_widths", "gains")),
        *((name, _INT) for name in ("batch", "heads", "key_heads", "queries", "key_length", "rank")),
        *((name, _INT) for name in ("value_width", "levels", "by_window")),
        ("scale", _FLOAT),
    ]


_STRUCTURES = {"View": View, "Call": CallStruct, "Gradients": Gradients, "Decode": DecodeStruct}
_TYPES = {_INT: "i", _FLOAT: "d", _POINTER: "p", ctypes.POINTER(View): "p", View: "v", _INT * 4: "a"}


def layout() -> str:
    """Return the sizes, fields, types and offsets of the structures, as csrc/layout.h writes those of C++."""
    lines = []
    for name, structure in _STRUCTURES.items():
        fields = [
            f"{field}:{_TYPES[kind]}@{getattr(structure, field).offset}" for field, kind, *_ in structure._fields_
        ]
        lines.append(" ".join([name, str(ctypes.sizeof(structure)), *fields]) + "\n")
    return "".join(lines)


def check_layout(compiled: str) -> None:
    """Raise RuntimeError unless `compiled`, the layout that the library reports, is `layout()`."""
    for theirs, ours in zip_longest(compiled.splitlines(), layout().splitlines(), fillvalue="nothing"):
        if theirs != ours:
            raise RuntimeError(
                f"a structure differs between C++ and Python: C++ (csrc) has {theirs!r}, "
                f"Python (library.py) has {ours!r}"
            )


def view(tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> View:
    """Return a View of `tensor`, axes of size 1 broadcast to `shape`; for None, one without data."""
    if tensor is None:
        return View(None)
    if shape is not None:
        tensor = tensor.expand(shape)
    return View(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride())


@functools.lru_cache(maxsize=256)
def _levels(hierarchy: Hierarchy, value_dim: int) -> tuple[ctypes.Array, ...]:
    """Return ranks, sizes, value widths and gains of the levels as arrays."""
    count = hierarchy.levels
    sizes = (size or 0 for size in hierarchy.sizes)
    widths = hierarchy.value_widths(value_dim)
    integers = ((_INT * count)(*numbers) for numbers in (hierarchy.ranks, sizes, widths))
    return *integers, (_FLOAT * count)(*hierarchy.gains)


def call_struct(call: Call, out: Tensor, lse: Tensor) -> CallStruct:
    """Return a call for C++, with the tensors that forward writes and backward reads. The caller keeps them alive."""
    (batch, heads, query_length, rank), (_, key_heads, key_length, width) = call.query.shape, call.value.shape
    return CallStruct(
        view(call.query),
        view(call.key),
        view(call.value),
        view(call.attn_bias, (batch, heads, query_length, key_length)),
        view(out),
        lse.data_ptr(),
        None if call.key_start is None else call.key_start.data_ptr(),
        None if call.key_end is None else call.key_end.data_ptr(),
        *(ctypes.addressof(array) for array in _levels(call.hierarchy, width)),
        *(batch, heads, key_heads, query_length, key_length, rank, width, call.hierarchy.levels),
        call.hierarchy.by_window,
        *(call.query_offset, call.is_causal, 0 if call.seed is None else int(call.seed)),
        *(call.scale, call.dropout_p),
    )


def decode_struct(
    call: DecodeCall, key_levels: Sequence[Tensor], value_levels: Sequence[Tensor], out: Tensor
) -> DecodeStruct:
    """Return a call of decode for C++; it keeps its arrays alive, the caller keeps the tensors."""
    (batch, heads, queries, rank), key_heads = call.query.shape, value_levels[0].shape[1]
    levels, width = call.hierarchy.levels, call.value_dim
    starts = (_INT * levels)(*call.level_starts)
    struct = DecodeStruct(
        *(view(call.query), view(out)),
        *((View * levels)(*map(view, tensors)) for tensors in (key_levels, value_levels)),
        ctypes.addressof(starts),
        None if call.key_start is None else call.key_start.data_ptr(),
        *(ctypes.addressof(array) for array in _levels(call.hierarchy, width)),
        *(batch, heads, key_heads, queries, call.key_length, rank, width, levels, call.hierarchy.by_window),
        call.scale,
    )
    struct.level_starts_array = starts
    return struct


def gradients_struct(
    call: Call, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Gradients:
    """Return the further tensors of a backward call. The caller keeps them alive."""
    shape = (*call.query.shape[:3], call.key.shape[2])
    return Gradients(view(grad_out), view(query), view(key), view(value), view(bias, shape))


def run(name: str, *structures: ctypes.Structure) -> None:
    """Call a function of the library; RuntimeError with its message where it fails. Other Python threads run on."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if not _function(name)(*map(ctypes.byref, structures), message):
        raise RuntimeError(f"{name}: {message.value.decode()}")


@functools.lru_cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function = getattr(_checked_library(), name)
    function.restype = ctypes.c_bool
    return function


@functools.lru_cache(maxsize=1)
def _checked_library() -> ctypes.CDLL:
    """Return the library of this process, once its structures are known to be ours."""
    loaded = build.library()
    loaded.structattn_layout.restype = ctypes.c_char_p
    check_layout(loaded.structattn_layout().decode())
    return loaded
