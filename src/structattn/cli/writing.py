"""Generate text with a trained character model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from structattn import checks
from structattn.models import ModelCache
from structattn.tasks.characters import decode, encode

if TYPE_CHECKING:
    from structattn.models import LanguageModel


@torch.inference_mode()
def write_on(model: LanguageModel, prompt: str, length: int, temperature: float, seed: int) -> Iterator[str]:
    """Yield the prompt, then `length` sampled characters one at a time.

    Each step reads one character and the key-value cache. At the end of a learned position table the older half of the
    text is dropped and the rest is read again. A rotary model has no such end.

    Raises:
        ValueError: no character of the prompt is in the vocabulary, `length` is not positive, or `temperature` is
            negative.
    """
    checks.positive_int("length", length)
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    text = torch.as_tensor(encode(prompt)).long()
    if not len(text):
        raise ValueError(f"prompt must hold a character of the vocabulary, got {prompt!r}")
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.context_length if model.config.positions == "learned" else math.inf
    model.eval()
    yield prompt
    unread, cache = text, ModelCache(model)
    for _ in range(length):
        if len(text) > limit:
            text = text[-model.config.context_length // 2 :]
            unread, cache = text, ModelCache(model)
        logits = model(unread[None], cache=cache, logits_to_keep=1).logits[0, -1]
        if temperature == 0:
            unread = logits.argmax()[None]
        else:
            unread = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        text = torch.cat([text, unread])
        yield decode(unread.numpy())
