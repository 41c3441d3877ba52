"""Text from a trained character model, as it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from structattn import checks
from structattn.tasks.characters import decode, encode

if TYPE_CHECKING:
    from structattn.models import StructuredModel


@torch.inference_mode()
def write_on(model: StructuredModel, prompt: str, length: int, temperature: float, seed: int) -> Iterator[str]:
    """The prompt, then `length` characters one at a time, each drawn from what the model gives it.

    The model sees at most its context: where that is full, the older half of it is dropped.

    Raises:
        ValueError: no character of the prompt is in the vocabulary, `length` is not positive, or `temperature` is
            negative.
    """
    checks.positive_int("length", length)
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    tokens = torch.as_tensor(encode(prompt)).long()
    if not len(tokens):
        raise ValueError(f"prompt must hold a character of the vocabulary, got {prompt!r}")
    generator = torch.Generator().manual_seed(seed)
    context = model.config.context_length
    model.eval()
    yield prompt
    tokens = tokens[-context:]
    for _ in range(length):
        if len(tokens) == context:
            tokens = tokens[context // 2 :]
        logits = model(tokens[None]).logits[0, -1]
        if temperature == 0:
            token = logits.argmax()[None]
        else:
            token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        tokens = torch.cat([tokens, token])
        yield decode(token.numpy())
