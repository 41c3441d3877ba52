"""Provide MLR attention in other libraries' models, imported on first use."""

from __future__ import annotations

import importlib

__all__ = ["chronos", "transformers"]


def __getattr__(name: str) -> object:
    """Import an integration on first use."""
    if name in __all__:
        return importlib.import_module(f"structattn.integrations.{name}")
    raise AttributeError(f"module 'structattn.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the integrations."""
    return __all__
