"""Count language in the tokens of a tokenizer.

Shapes: `B` windows of `T` tokens, vocabulary of `V`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from structattn import checks
from structattn.tasks.corpus import Corpus, split
from structattn.tasks.language import LanguageConfig, LanguageTask
from structattn.tasks.sources import open_source
from structattn.tasks.tokenizers import Vocabulary

Encode = Callable[[str], Sequence[int]]
"""Maps a text to its tokens."""


class TokenTask(LanguageTask):
    """`LanguageTask` whose lengths, windows and losses are in tokens.

    Losses are nats per token. Those under two tokenizers do not compare, since their tokens have different lengths.

    Args:
        config: text, and the window and evaluation in tokens.
        encode: the tokenizer; it is given whole documents.
        vocabulary_size: `V`, the width of the model's logits.
        seed: selects the training order.

    Raises:
        ValueError: as `open_source` and `LanguageTask`, or a token is outside the vocabulary.
    """

    def __init__(self, config: LanguageConfig, encode: Encode, vocabulary_size: int, *, seed: int = 0) -> None:
        vocabulary = _TokensOfModel(checks.positive_int("vocabulary_size", vocabulary_size))
        super().__init__(config, seed=seed, corpus=_encoded(config.data, encode), tokenizer=vocabulary)
        largest = max(int(self.corpus.train.max()), int(self.corpus.validation.max()))
        if largest >= vocabulary_size:
            raise ValueError(f"the tokenizer gives token {largest}, and the model's vocabulary has {vocabulary_size}")


class _TokensOfModel(Vocabulary):
    """The tokens of a model's read-out."""

    token: ClassVar[str] = "token"

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size


def _encoded(data: str, encode: Encode) -> Corpus:
    """Return a text as int32 tokens, split like `structattn.tasks.corpus`."""
    source = open_source(data)
    documents = []
    for index, document in enumerate(source.documents()):
        tokens = np.array(encode("".join(document).strip("\n") + "\n\n"), dtype=np.int32)
        documents.append(split(tokens, index, source))
    parts = [np.concatenate(part) for part in zip(*documents, strict=True)]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:32]
    return Corpus(data, digest, *parts)
