"""Flatten a call for an operator of `torch.library`.

Operators take tensors, plain numbers and text only; a hierarchy goes as its text form.

The arguments of both operators of attention are the tensors in `TENSORS`, then the options in `OPTIONS`; those of
decode end with a hierarchy and numbers of its own (`structattn.ops.decode`). The C++ code repeats them in
csrc/binding.cpp and csrc/autograd.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.hierarchy import Hierarchy

TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed"
OPTIONS = "str hierarchy, bool is_causal, float scale, SymInt query_offset, float dropout_p, str backend"
TENSOR_COUNT = len(TENSORS.split(", "))
ARGUMENT_COUNT = TENSOR_COUNT + len(OPTIONS.split(", "))


def tensors_of(call: Call) -> tuple[Tensor | None, ...]:
    """Return the tensors of a call in the order of `TENSORS`."""
    return (call.query, call.key, call.value, call.attn_bias, call.key_start, call.key_end, call.seed)


def options_of(call: Call, backend: str) -> tuple[Any, ...]:
    """Return everything else in the order of `OPTIONS`."""
    return (call.hierarchy.text, call.is_causal, call.scale, call.query_offset, call.dropout_p, backend)


def unpack(arguments: Sequence[Any]) -> tuple[Call, str]:
    """Return the call and the backend's name from an operator's arguments."""
    query, key, value, bias, start, end, seed = arguments[:TENSOR_COUNT]
    text, is_causal, scale, query_offset, dropout_p, backend = arguments[TENSOR_COUNT:]
    hierarchy = hierarchy_of(text)
    call = Call(query, key, value, bias, start, end, seed, hierarchy, is_causal, scale, query_offset, dropout_p)
    return call, backend


@functools.lru_cache(maxsize=256)  # every call asks for it
def hierarchy_of(text: str) -> Hierarchy:
    """Return the hierarchy whose text form an operator was given."""
    return Hierarchy.parse(text)


def pad_with_none(grads: Sequence[Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    """Return the gradients, followed by None up to `count` of them."""
    return (*grads, *(None,) * (count - len(grads)))


def in_python(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Wrap `function` for C++: return exceptions as text, never raise.

    The operators in C++ call it for what their kernel does not serve (csrc/binding.cpp). It returns the results and,
    last, the text of an exception as bytes; there are none where nothing was raised.
    """

    def call(*args: Any) -> list[Tensor]:
        try:
            results, raised = function(*args), b""
        except Exception as error:
            results, raised = (), f"{type(error).__name__}: {error}".encode()
        text = torch.tensor(list(raised), dtype=torch.uint8, device="cpu")
        return [*([results] if isinstance(results, Tensor) else results), text]

    return call
