"""A model run with its standard attention, each layer's queries and keys shown to a meter of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from structattn.integrations.transformers.layers import is_causal, is_cross_attention
from structattn.models.transformers_internals import attention_implementation, set_attention_implementation

_MEASURING = "structattn_measuring"

Batches = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids `(B, T)`, or a model's keyword arguments, or an iterable of either."""


class Meter(Protocol):
    """Sums over what one layer is shown."""

    def add(self, query: Tensor, key: Tensor, real: Tensor, *, is_causal: bool) -> None:
        """Count a batch: query `(B, Hq, T, r)`, key `(B, Hkv, T, r)`, real `(B, T)`, false at padding."""


@torch.no_grad()
def measure(model: PreTrainedModel, meters: Mapping[int, Meter], batches: Batches) -> None:
    """Run `model` in evaluation mode over `batches`; it is left as it was.

    Args:
        model: a model of transformers.
        meters: of every self-attention layer, by the `id` of its module.
        batches: see `Batches`.

    Raises:
        TypeError: a batch is neither token ids nor keyword arguments.
    """
    with _measuring(model, meters):
        for batch in _as_keywords(batches):
            model(**batch)


_METERS: ContextVar[Mapping[int, Meter] | None] = ContextVar("meters", default=None)


@contextmanager
def _measuring(model: PreTrainedModel, meters: Mapping[int, Meter]) -> Iterator[None]:
    """The model in evaluation mode with the measuring attention; afterwards as it was."""
    before, training = attention_implementation(model.config), model.training
    token = _METERS.set(meters)
    try:
        model.eval()
        set_attention_implementation(model, _MEASURING)
        yield
    finally:
        set_attention_implementation(model, before)
        model.train(training)
        _METERS.reset(token)


def _measuring_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Standard attention that shows its queries and keys to the layer's meter."""
    meters = _METERS.get()
    if meters is None:
        raise ValueError(f"{_MEASURING!r} serves measurements alone; set another attention implementation")
    if not is_cross_attention(module):
        batch, _, length, _ = key.shape
        real = torch.ones(batch, length, dtype=torch.bool, device=key.device)
        # The last query of a causal mask, and any of one that is not, sees every real key.
        real = real if attention_mask is None else attention_mask[:, 0, -1].expand(batch, -1)
        meters[id(module)].add(query, key, real, is_causal=is_causal(module))
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


AttentionInterface.register(_MEASURING, _measuring_forward)
AttentionMaskInterface.register(_MEASURING, sdpa_mask)
