"""Load the compiled library of the CPU kernel.

It registers operators with PyTorch when it is loaded: those of `structattn_cpu`, which are the kernel itself, and the
kernels of `structattn`'s operators for tensors on the CPU (csrc/binding.cpp). A library from source brings their
derivatives as well.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from structattn.ops.cpu import build, prebuilt
from structattn.ops.cpu.build import BuildError

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
KERNEL = "STRUCTATTN_KERNEL"
"""Environment variable: an instruction set of `prebuilt`, or `source` to compile."""


@dataclass
class _State:
    path: Path | None = None
    loaded: bool = False
    differentiates: bool = False


state = _State()
"""`loaded` from `path`: operators have kernels for the CPU. `differentiates`: they have derivatives in C++ as well."""


@functools.lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why this process has no library, or None. Loading is tried once."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def load() -> None:
    """Load the prebuilt library for this machine, or the one from source.

    Raises:
        BuildError: neither can be had; the message says why.
        ValueError: `STRUCTATTN_KERNEL` names a library that is not there, or that this machine cannot run.
    """
    named = os.environ.get(KERNEL, "")
    path = None if named == "source" else prebuilt.choose(named)
    from_source = path is None
    path = build.build() if path is None else path
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    state.path, state.differentiates, state.loaded = path, from_source, True
