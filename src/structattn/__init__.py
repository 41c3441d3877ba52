"""Softmax attention whose score has the structure you choose (arXiv 2509.07963)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structattn import flops, integrations, layers, models, ops, structures, tasks, training
    from structattn.ops import Hierarchy, mlr_attention

_PACKAGES = ("flops", "integrations", "layers", "models", "ops", "structures", "tasks", "training")

__all__ = [
    "Hierarchy",
    "flops",
    "integrations",
    "layers",
    "mlr_attention",
    "models",
    "ops",
    "structures",
    "tasks",
    "training",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import on first use: `structattn --help` should not wait for torch."""
    if name in _PACKAGES:
        return importlib.import_module(f"structattn.{name}")
    if name in __all__:
        return getattr(importlib.import_module("structattn.ops"), name)
    raise AttributeError(f"module 'structattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is public."""
    return [*__all__, "__version__"]
