"""Collect statistics of each layer's queries, keys and values while a model runs with standard attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from structattn.integrations.transformers.layers import is_causal, is_cross_attention
from structattn.models.transformers_internals import attention_implementation, set_attention_implementation

_COLLECTING = "structattn_statistics"

Batches = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids `(B, T)`, or a model's keyword arguments, or an iterable of either."""


class LayerInputs(NamedTuple):
    """Arguments of one layer's attention for a batch.

    Attributes:
        query: `(B, Hq, T, r)`.
        key: `(B, Hkv, T, r)`.
        value: `(B, Hkv, T, dv)`.
        real: `(B, T)`, false at padding.
        is_causal: True if a token sees only itself and earlier ones.
        scale: factor on every score.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor
    is_causal: bool
    scale: float


class LayerStatistics(Protocol):
    """Running sums over the inputs of one layer's attention."""

    def add(self, inputs: LayerInputs) -> None:
        """Add a batch."""


@torch.no_grad()
def collect_statistics(model: PreTrainedModel, statistics: Mapping[int, LayerStatistics], batches: Batches) -> None:
    """Run a model and add each layer's inputs to its statistics.

    Args:
        model: runs with standard attention; its mode and attention implementation are restored.
        statistics: of every self-attention layer, by the `id` of its module.
        batches: see `Batches`.

    Raises:
        TypeError: a batch is neither token ids nor keyword arguments.
    """
    with _collecting(model, statistics):
        for batch in _as_keywords(batches):
            model(**batch)


_STATISTICS: ContextVar[Mapping[int, LayerStatistics] | None] = ContextVar("statistics", default=None)


@contextmanager
def _collecting(model: PreTrainedModel, statistics: Mapping[int, LayerStatistics]) -> Iterator[None]:
    """Put the model in evaluation mode with the collecting attention; restore both afterwards."""
    before, training = attention_implementation(model.config), model.training
    token = _STATISTICS.set(statistics)
    try:
        model.eval()
        set_attention_implementation(model, _COLLECTING)
        yield
    finally:
        set_attention_implementation(model, before)
        model.train(training)
        _STATISTICS.reset(token)


def _collecting_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return standard attention, after adding its inputs to the layer's statistics."""
    statistics = _STATISTICS.get()
    if statistics is None:
        raise ValueError(f"{_COLLECTING!r} serves collect_statistics alone; set another attention implementation")
    if not is_cross_attention(module):
        batch, _, length, _ = key.shape
        real = torch.ones(batch, length, dtype=torch.bool, device=key.device)
        if attention_mask is not None:
            # A real token sees itself under every mask; a later one may not, in a sliding window.
            real = attention_mask[:, 0].diagonal(dim1=1, dim2=2).expand(batch, -1)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        statistics[id(module)].add(LayerInputs(query, key, value, real, is_causal(module), scale))
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out


def _as_keywords(batches: Batches) -> Iterator[dict[str, Any]]:
    each: Iterable[Any] = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    for batch in each:
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(
                f"batches must be token ids or mappings of the model's arguments, got {type(batch).__name__}"
            )
        keywords = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        yield keywords | {"use_cache": False}


AttentionInterface.register(_COLLECTING, _collecting_forward)
AttentionMaskInterface.register(_COLLECTING, sdpa_mask)
