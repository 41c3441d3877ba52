"""One call of the op, as backends see it: checked tensors and the choices that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from structattn.ops.hierarchy import Hierarchy


@dataclass(frozen=True)
class Call:
    """The arguments of `mlr_attention` after its checks; the meaning of each is said there.

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
    def lse_dtype(self) -> torch.dtype:
        """The dtype of log-sum-exp rows, and of accumulation: float64 for float64 inputs, else float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


class Backend(Protocol):
    """What a backend's module provides.

    `forward` returns the output `(B, Hq, Tq, dv)` in the query's dtype and the log-sum-exp of each query's scores
    `(B, Hq, Tq)` in `call.lse_dtype`, natural logarithm, `+inf` where a query attends to nothing (so that
    `exp(score - lse)` is its probability, zero there). `backward` may be given the results of any other backend.
    """

    def ineligible(self, call: Call | None = None) -> str | None:
        """Why this backend cannot serve `call` (or any call on this machine, if None); None where it can."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""

    def backward(
        self, call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of query, key, value and (where asked for) bias."""


def as_backend(module: ModuleType) -> Backend:
    """A module that provides the three functions of `Backend`, as one."""
    return cast(Backend, module)
