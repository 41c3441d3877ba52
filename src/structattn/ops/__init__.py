"""The attention op: the hierarchy that shapes the score, one face, and its backends."""

from structattn.ops.attention import mlr_attention
from structattn.ops.decode import mlr_decode
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.registry import BackendStatus, backends

__all__ = ["BackendStatus", "Hierarchy", "backends", "mlr_attention", "mlr_decode"]
