"""Generate text with a trained language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from structattn import checks
from structattn.models import ModelCache
from structattn.tasks.tokenizers import UNKNOWN, Tokenizer

if TYPE_CHECKING:
    from structattn.models import LanguageModel

_CONTEXT = 8  # Tokens of the prompt that the next one is decoded with: more than the four bytes of a character.


@torch.inference_mode()
def write_on(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yield the prompt, then the text of `length` sampled tokens.

    Text comes as soon as it is known. Each step reads one token and the key-value cache. At the end of a learned
    position table the older half of the text is dropped and the rest is read again. A rotary model has no such end.

    Raises:
        ValueError: the prompt has no token, `length` is not positive, or `temperature` is negative.
    """
    checks.positive_int("length", length)
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    text = torch.tensor(tokenizer.encode(prompt).tolist(), dtype=torch.long)
    if not len(text):
        raise ValueError(f"prompt must hold a character of the vocabulary, got {prompt!r}")
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.context_length if model.config.positions == "learned" else math.inf
    model.eval()
    yield prompt
    unread, cache = text, ModelCache(model)
    words = _Words(tokenizer, text.tolist())
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
        yield words.add(int(unread))
    yield words.rest()


class _Words:
    """Text of tokens that come one by one.

    A character may take several tokens, and a space depend on the token before.

    Args:
        tokenizer: decodes the tokens.
        context: tokens before the first.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context, self._waiting = context[-_CONTEXT:], list[int]()
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that `token` completes.

        The next tokens may still change an unknown character at its end.
        """
        self._waiting.append(token)
        text = self._text()
        known = text.rstrip(UNKNOWN)
        words, self._shown = known[self._shown :], max(self._shown, len(known))
        if known == text:
            self._context, self._waiting, self._shown = self._waiting, [], 0
        return words

    def rest(self) -> str:
        """Return the text that waits for the end of a character."""
        return self._text()[self._shown :]

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]
