"""What makes the ops of this package usable from the libraries people already have, a module for each library.

Nothing is imported here: `structattn.integrations.transformers` imports transformers with its first use.
"""

from __future__ import annotations

import importlib

__all__ = ["chronos", "transformers"]


def __getattr__(name: str) -> object:
    """Import an integration with its first use."""
    if name in __all__:
        return importlib.import_module(f"structattn.integrations.{name}")
    raise AttributeError(f"module 'structattn.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the integrations."""
    return __all__
