"""Hold the checked arguments of attention for backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from structattn.ops.hierarchy import Hierarchy


@dataclass(frozen=True)
class Call:
    """One call of `mlr_attention`, which explains each argument.

    Shapes: `query (B, Hq, Tq, r)`, `key (B, Hkv, Tk, r)`, `value (B, Hkv, Tk, dv)`, `attn_bias` four-dimensional with
    each axis full or 1, `key_start` and `key_end (B,)`, `seed ()` int64 where `dropout_p > 0`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    seed: Tensor | None
    hierarchy: Hierarchy
    is_causal: bool
    scale: float
    query_offset: int
    dropout_p: float

    @property
    def value_dim(self) -> int:
        """Width of the values, `dv`."""
        return self.value.shape[3]

    @property
    def value_widths(self) -> tuple[int, ...]:
        """Value dimensions that each level owns, `u_1 … u_L`."""
        return self.hierarchy.value_widths(self.value.shape[3])

    @property
    def lse_dtype(self) -> torch.dtype:
        """Dtype of log-sum-exp and of accumulation, see `lse_dtype`."""
        return lse_dtype(self.query)


@dataclass(frozen=True)
class DecodeCall:
    """One call of `mlr_decode`, which explains each argument.

    Shapes: `query (B, Hq, Tq, r)`, `key_levels[l] (B, Hkv, r_l, capacity_l)`, `value_levels[l] (B, Hkv, capacity_l,
    u_l)`, `key_start (B,)`. There is one tensor of values for each level; `u_l` may be 0.
    """

    query: Tensor
    key_levels: Sequence[Tensor]
    value_levels: Sequence[Tensor]
    key_start: Tensor | None
    hierarchy: Hierarchy
    key_length: int
    level_starts: Sequence[int]
    scale: float

    @property
    def value_dim(self) -> int:
        """Width of the output, `dv = Σ u_l`."""
        return sum(values.shape[3] for values in self.value_levels)


def lse_dtype(query: Tensor) -> torch.dtype:
    """Return float64 for a float64 query, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class Backend(Protocol):
    """The functions that a backend's module provides."""

    def ineligible(self, call: Call | None = None) -> str | None:
        """Return why `call`, or any call if None, cannot be served here."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp.

        Returns:
            The output `(B, Hq, Tq, dv)` in the query's dtype, and the natural logarithm of the sum of exponentials of
            each query's scores, `(B, Hq, Tq)` in `call.lse_dtype`. That is `+inf` where a query attends to nothing, so
            that `exp(score - lse)` is its probability, 0.
        """

    def backward(
        self, call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients of query, key, value and, if needed, bias.

        `out` and `lse` may come from the `forward` of any backend.
        """
