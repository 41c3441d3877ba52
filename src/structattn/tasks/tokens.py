"""Language in the tokens of a tokenizer.

Shapes: `B` windows of `T` tokens, vocabulary of `V`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from structattn import checks
from structattn.tasks.corpus import Corpus, split
from structattn.tasks.language import LanguageConfig, LanguageTask
from structattn.tasks.sources import open_source
from structattn.tasks.task import Totals

Encode = Callable[[str], Sequence[int]]
"""Maps a text to its tokens."""


class TokenTask(LanguageTask):
    """`LanguageTask` in tokens: lengths, windows, and the loss in nats per token.

    Losses under two tokenizers do not compare, since their tokens have different lengths.

    Args:
        config: text, and the window and evaluation in tokens.
        encode: the tokenizer; it is given whole documents.
        vocabulary_size: `V`, the width of the model's logits.
        seed: selects the training order.

    Raises:
        ValueError: as `open_source` and `LanguageTask`, or a token is outside the vocabulary.
    """

    token: ClassVar[str] = "token"
    units: ClassVar[Mapping[str, str]] = {"nats_per_token": "nats per token"}

    def __init__(self, config: LanguageConfig, encode: Encode, vocabulary_size: int, *, seed: int = 0) -> None:
        self.vocabulary_size = checks.positive_int("vocabulary_size", vocabulary_size)
        super().__init__(config, seed=seed, corpus=_encoded(config.data, encode))
        largest = max(int(self.corpus.train.max()), int(self.corpus.validation.max()))
        if largest >= vocabulary_size:
            raise ValueError(f"the tokenizer gives token {largest}, and the model's vocabulary has {vocabulary_size}")

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return nats per token."""
        return {"nats_per_token": (totals["nats"] / totals["tokens"]).item()}

    def totals(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Totals:
        """Return `nats ()`, the summed cross-entropy, and `tokens ()`, the number of tokens."""
        both = super().totals(outputs, dict(batch))
        return {"nats": both["nats"], "tokens": both["characters"]}


def _encoded(data: str, encode: Encode) -> Corpus:
    """Return the text that `data` names as int32 tokens, split like `structattn.tasks.corpus`."""
    source = open_source(data)
    documents = []
    for index, document in enumerate(source.documents()):
        tokens = _tokens("".join(document).strip("\n") + "\n\n", encode)
        documents.append(split(tokens, index, source))
    parts = [np.concatenate(part) for part in zip(*documents, strict=True)]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:32]
    return Corpus(data, digest, *parts)


def _tokens(text: str, encode: Encode) -> NDArray[Any]:
    return np.array(encode(text), dtype=np.int32)
