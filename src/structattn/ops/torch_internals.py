"""Read private names of torch, with a fallback for each.

A fallback is slower, or says "not known"; callers then take the path that is always correct.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

WATCHERS = (
    "_C._get_tracing_state",
    "_C._len_torch_dispatch_stack",
    "_C._functorch.peek_interpreter_stack",
    "_C._is_any_autocast_enabled",
    "autograd._profiler_enabled",
    "autograd.forward_ad._current_level",
    "Tensor._is_zerotensor",
)
"""Names that tell whether something watches operators; the direct path around them needs all."""


def find(name: str) -> Any:
    """Return torch's attribute of that dotted name, or None."""
    owner: Any = torch
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


COMPLETE = all(find(name) is not None for name in WATCHERS)
"""True where torch has all of `WATCHERS`."""

_PLAIN = {Tensor, Parameter, type(None)}
_peek_interpreter_stack = find("_C._functorch.peek_interpreter_stack")
_below_autograd = find("_C._AutoDispatchBelowAutograd")
_assert_async = find("_assert_async")
_counts_writes = find("Tensor._version") is not None


def is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if nothing watches operators and all tensors are plain.

    Watchers are a compiler, a tracer, a dispatch mode (such as a FLOP counter), a transform, a dual level, a profiler
    and autocast. A tensor does not hold its own numbers if it stands for zeros, or for the negative of its memory.
    False where torch lacks one of `WATCHERS`: the operator is always correct.
    """
    if (
        not COMPLETE
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or _peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch._C._is_any_autocast_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return False
    # A loop, which takes half the time of a generator.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if no tensor is of a subclass, such as FakeTensor."""
    return _PLAIN.issuperset(map(type, tensors))


def is_untransformed() -> bool:
    """Return True without transform, dual level and autocast.

    False where torch lacks one of `WATCHERS`.
    """
    return (
        COMPLETE
        and _peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_any_autocast_enabled()
    )


def need_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if autograd records calls on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context in which operators skip autograd, and so its Python."""
    return nullcontext() if _below_autograd is None else _below_autograd()


def may_be_transformed() -> bool:
    """Return True if a `torch.func` transform may be at work."""
    return _peek_interpreter_stack is None or _peek_interpreter_stack() is not None


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if a tensor carries a tangent of forward-mode differentiation."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def assert_later(condition: Tensor, message: str) -> None:
    """Raise where the boolean `condition` is false.

    Raises:
        RuntimeError: when an accelerator or a compiled graph computes the condition.
        ValueError: at once, where torch has no assertion that waits.
    """
    if _assert_async is None:
        if not bool(condition):
            raise ValueError(message)
    else:
        _assert_async(condition, message)


def count_writes(tensors: Iterable[Tensor]) -> float:
    """Return a number that changes when a tensor is written to.

    It is the sum of autograd's version counters; without those, the sum of all numbers in the tensors. Tensors of
    inference mode are not counted.
    """
    seen = (tensor for tensor in tensors if not tensor.is_inference())
    if _counts_writes:
        return sum(tensor._version for tensor in seen)
    return sum(float(tensor.detach().double().sum()) for tensor in seen)
