"""Softmax attention whose score has the structure you choose (arXiv 2509.07963)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structattn.ops import Hierarchy, mlr_attention

__all__ = ["Hierarchy", "mlr_attention"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import torch with the first use of the op: `structattn --help` should not wait for it."""
    if name in __all__:
        import structattn.ops

        return getattr(structattn.ops, name)
    raise AttributeError(f"module 'structattn' has no attribute {name!r}")
