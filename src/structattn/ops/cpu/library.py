"""The compiled library's functions, and the plain structures in which a call crosses to it (csrc/call.h)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.ops.call import Call, DecodeCall
from structattn.ops.cpu import build
from structattn.ops.hierarchy import Hierarchy

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MESSAGE_BYTES = 1024
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class View(ctypes.Structure):
    """A tensor of four axes."""

    _fields_ = [("data", _POINTER), ("dtype", _INT), ("stride", _INT * 4)]


class CallStruct(ctypes.Structure):
    """The arguments of a call."""

    _fields_ = [
        *((name, View) for name in ("query", "key", "value", "bias", "out")),
        *((name, _POINTER) for name in ("lse", "key_start", "key_end", "ranks", "block_sizes", "gains")),
        *((name, _INT) for name in ("batch", "heads", "key_heads", "query_length", "key_length", "rank")),
        *((name, _INT) for name in ("value_width", "levels", "query_offset", "is_causal", "seed")),
        *((name, _FLOAT) for name in ("scale", "dropout_p")),
    ]


class Gradients(ctypes.Structure):
    """What backward reads and writes beside the call."""

    _fields_ = [(name, View) for name in ("grad_out", "query", "key", "value", "bias")]


class DecodeStruct(ctypes.Structure):
    """The arguments of a call of decode (csrc/decode.h)."""

    _fields_ = [
        *((name, View) for name in ("query", "value", "out")),
        ("key_levels", ctypes.POINTER(View)),
        *((name, _POINTER) for name in ("level_starts", "key_start", "ranks", "block_sizes", "gains")),
        *((name, _INT) for name in ("batch", "heads", "key_heads", "queries", "key_length", "rank")),
        *((name, _INT) for name in ("value_width", "levels")),
        ("scale", _FLOAT),
    ]


def view(tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> View:
    """`tensor` as a View, its axes of size 1 broadcast to `shape`; no data where it is None."""
    if tensor is None:
        return View(None)
    if shape is not None:
        tensor = tensor.expand(shape)
    return View(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride())


@functools.lru_cache(maxsize=256)
def _levels(hierarchy: Hierarchy) -> tuple[ctypes.Array, ctypes.Array, ctypes.Array]:
    count = hierarchy.levels
    sizes = (size or 0 for size in hierarchy.block_sizes)
    return (_INT * count)(*hierarchy.ranks), (_INT * count)(*sizes), (_FLOAT * count)(*hierarchy.gains)


def call_struct(call: Call, out: Tensor, lse: Tensor) -> CallStruct:
    """`call` with the tensors that forward writes and backward reads again. The caller keeps them alive."""
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
        *(ctypes.addressof(array) for array in _levels(call.hierarchy)),
        *(batch, heads, key_heads, query_length, key_length, rank, width, call.hierarchy.levels),
        *(call.query_offset, call.is_causal, 0 if call.seed is None else int(call.seed)),
        *(call.scale, call.dropout_p),
    )


def decode_struct(call: DecodeCall, key_levels: Sequence[Tensor], out: Tensor) -> DecodeStruct:
    """Return a call of decode for C++; it keeps its arrays alive, the caller keeps the tensors."""
    (batch, heads, queries, rank), (_, key_heads, _, width) = call.query.shape, call.value.shape
    starts = (_INT * len(call.level_starts))(*call.level_starts)
    struct = DecodeStruct(
        *(view(call.query), view(call.value), view(out), (View * len(key_levels))(*map(view, key_levels))),
        ctypes.addressof(starts),
        None if call.key_start is None else call.key_start.data_ptr(),
        *(ctypes.addressof(array) for array in _levels(call.hierarchy)),
        *(batch, heads, key_heads, queries, call.key_length, rank, width, call.hierarchy.levels),
        call.scale,
    )
    struct.level_starts_array = starts
    return struct


def gradients_struct(
    call: Call, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Gradients:
    """The tensors of a backward call; as `call_struct`, without references."""
    shape = (*call.query.shape[:3], call.key.shape[2])
    return Gradients(view(grad_out), view(query), view(key), view(value), view(bias, shape))


def run(name: str, *structures: ctypes.Structure) -> None:
    """Call a function of the library; RuntimeError with its message where it fails. Other Python threads run on."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if not _function(name)(*map(ctypes.byref, structures), message):
        raise RuntimeError(f"{name}: {message.value.decode()}")


@functools.lru_cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function = getattr(build.library(), name)
    function.restype = ctypes.c_bool
    return function
