"""Provide the attention ops, their hierarchy and their backends."""

from structattn import versions

versions.check("torch")

from structattn.ops.attention import mlr_attention  # noqa: E402
from structattn.ops.decode import mlr_decode  # noqa: E402
from structattn.ops.hierarchy import Hierarchy  # noqa: E402
from structattn.ops.registry import BackendStatus, backends  # noqa: E402

__all__ = ["BackendStatus", "Hierarchy", "backends", "mlr_attention", "mlr_decode"]
