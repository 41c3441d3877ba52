"""The attention op: the hierarchy that shapes the score, one face, and its backends."""

from structattn.ops.attention import mlr_attention
from structattn.ops.backends import BackendStatus, backends
from structattn.ops.hierarchy import Hierarchy

__all__ = ["BackendStatus", "Hierarchy", "backends", "mlr_attention"]
