"""Say where a part runs: on a card, or as a rehearsal on the CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import machine

REHEARSED_CARD = {"card": "none: rehearsed on the CPU", "capability": "0.0", "memory_gb": 0.0, "cuda": None}


@dataclass(frozen=True)
class Setup:
    """Device and options of a run."""

    rehearse: bool = False
    """Run every code path at tiny sizes on the CPU, in Triton's interpreter. Nothing is measured."""
    processes: int = 1
    """Processes that compile at the same time."""
    case_seconds: float = 1.0
    """Time for the rounds of each timed case."""
    only: str = ""
    """Run only cases whose name contains this."""
    data: str | None = None
    """Folder of texts for the comparison of language models."""
    scratch: Path = field(default_factory=lambda: Path("runs/gpu"))
    """Folder for the runs of the comparison."""

    @property
    def device(self) -> str:
        """Device of tensors."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def half(self) -> torch.dtype:
        """Dtype of what is timed; the interpreter is wrong in bfloat16."""
        return torch.float32 if self.rehearse else torch.bfloat16

    @property
    def compiler(self) -> str:
        """Backend of `torch.compile`."""
        return "eager" if self.rehearse else "inductor"

    @property
    def least_rounds(self) -> int:
        """Rounds of a timed case at least."""
        return 1 if self.rehearse else 3

    def facts(self) -> dict[str, Any]:
        """Return machine, card and versions."""
        if not self.rehearse:
            return {**machine.facts(), **machine.card()}
        import triton

        return {**machine.facts(), **REHEARSED_CARD, "triton": triton.__version__}

    def prepare(self) -> None:
        """Ask for the interpreter in a rehearsal.

        Call it before Triton is imported.
        """
        if self.rehearse:
            os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def synchronize(self) -> None:
        """Wait for the card."""
        if not self.rehearse:
            torch.cuda.synchronize()


def kernels_serve(setup: Setup) -> AbstractContextManager[None]:
    """Let models take the Triton kernels by themselves, in a rehearsal too.

    On a card they do so anyway. On a CPU `backend="auto"` never takes the interpreter.
    """
    return auto_means("triton") if setup.rehearse else contextlib.nullcontext()


@contextlib.contextmanager
def auto_means(backend: str) -> Iterator[None]:
    """Let `backend="auto"` mean a certain backend inside a `with` block."""
    from structattn.ops import decode, operator, registry
    from structattn.ops.cpu import library

    chosen, decoder = registry.choose, decode._choose
    decoding = backend if backend in decode._BACKENDS else "dense"
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (registry, "choose", lambda name, call: chosen(backend if name == "auto" else name, call)),
            (decode, "_choose", lambda name, call: decoder(decoding if name == "auto" else name, call)),
            (operator, "may_run_in_cpp", lambda *_: False),
            (decode, "may_run_in_cpp", lambda *_: False),
            (library.state, "differentiates", False),
        ):
            patches.enter_context(patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def one_choice_of_blocks(index: int) -> Iterator[None]:
    """Give every kernel one choice of block sizes: nothing is tuned.

    It is the last choice where a kernel has fewer.
    """
    from structattn.ops.triton import launch

    choices = launch.configs
    with patch.object(launch, "configs", lambda *which: choices(*which)[: index + 1][-1:]):
        launch.tuned.cache_clear()
        try:
            yield
        finally:
            launch.tuned.cache_clear()


@contextlib.contextmanager
def compile_times() -> Iterator[list[dict[str, Any]]]:
    """Record Triton's seconds to compile each kernel inside a `with` block."""
    from triton import knobs

    found: list[dict[str, Any]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.append({"kernel": _name_of(src), "seconds": times.total / 1e6})

    earlier = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = earlier


def _name_of(source: Any) -> str:
    return str(getattr(getattr(source, "fn", None), "__name__", source))


@contextlib.contextmanager
def choices_made() -> Iterator[list[dict[str, Any]]]:
    """Record the block sizes that tuning takes inside a `with` block.

    The list is filled when the block ends.
    """
    from structattn.ops.triton import launch

    known, made = len(launch.choices()), []
    yield made
    for choice in launch.choices()[known:]:
        made.append(
            {"kernel": choice.kernel, "call": str(choice.key), "chosen": choice.config, "seconds": choice.seconds}
        )
