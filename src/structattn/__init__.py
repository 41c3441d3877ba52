"""Softmax attention whose score has the structure you choose (arXiv 2509.07963)."""

from structattn.ops import Hierarchy, mlr_attention

__all__ = ["Hierarchy", "mlr_attention"]
__version__ = "0.1.0"
