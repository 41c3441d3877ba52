"""Character-level language: predict every character of a window from those before it.

Shapes: `B` windows of `T` characters, vocabulary of 96 (`structattn.tasks.characters`).
Source of the setting: arXiv 2509.07963, section 5.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from structattn.tasks.characters import VOCABULARY
from structattn.tasks.corpus import Corpus, load_corpus
from structattn.tasks.profiles.language import LanguageConfig
from structattn.tasks.randomness import Stream, generator, places_in_epochs
from structattn.tasks.task import Batch, Task, Totals


class LanguageTask(Task):
    """Windows of a corpus, and the cross-entropy of each next character.

    A batch has `inputs (B, T)` and `targets (B, T)`, int64; `targets[b, t]` is the character after
    `inputs[b, t]`. A model returns logits `(B, T, 96)`.

    *Training order.* The training part is cut into windows at a random phase and every window is read once, in a
    random order; then it is cut and shuffled again. Row `n` of step `s` is window `s · batch_size + n` of that
    endless sequence, so the sequence is the same for every batch size, number of processes and structure.

    *Evaluation.* Windows that do not overlap, spread evenly over the validation part.

    *Loss.* Mean cross-entropy in nats per character.

    Args:
        config: text and window length.
        seed: selects the training order.
        corpus: tokens to use in place of `config.data`.
        cache: folder of token files, see `load_corpus`.

    Raises:
        ValueError: as `load_corpus`, or a part of the corpus is shorter than a window and the character after it.
    """

    name: ClassVar[str] = "language"
    token: ClassVar[str] = "character"
    """Unit that the text is cut into."""

    vocabulary_size: int = len(VOCABULARY)
    """Width of a model's logits."""

    units: ClassVar[Mapping[str, str]] = {
        "nats_per_character": "nats per character",
        "bits_per_character": "bits per character",
    }

    def __init__(
        self,
        config: LanguageConfig,
        *,
        seed: int = 0,
        corpus: Corpus | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(seed)
        self.config = config
        self.corpus = load_corpus(config.data, cache) if corpus is None else corpus
        length = config.context_length
        for part, tokens in (("training", self.corpus.train), ("validation", self.corpus.validation)):
            if len(tokens) < length + 1:
                raise ValueError(
                    f"data: the {part} part of {self.corpus.name} has {len(tokens)} {self.token}s; "
                    f"context_length {length} needs at least {length + 1}"
                )
        self.windows_per_epoch = max(1, len(self.corpus.train) // length - 1)
        self._evaluation_starts = _spread(len(self.corpus.validation), length, config.evaluation_tokens // length)
        self._order = functools.lru_cache(maxsize=1)(self._draw_order)

    @property
    def context_length(self) -> int:
        """Characters `T` of a window."""
        return self.config.context_length

    @property
    def evaluation_size(self) -> int:
        """Windows of the held-out set."""
        return len(self._evaluation_starts)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of logits `(B, T, 96)`, in nats per character."""
        return self._cross_entropy(outputs, batch).mean()

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return `nats ()`, the summed cross-entropy, and `characters ()`, the number of characters."""
        nats = self._cross_entropy(outputs, batch).double().sum()
        return {"nats": nats, "characters": nats.new_tensor(batch["targets"].numel())}

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return nats per character, and bits: nats over ln 2."""
        nats = (totals["nats"] / totals["characters"]).item()
        return {"nats_per_character": nats, "bits_per_character": nats / math.log(2)}

    @property
    def data_summary(self) -> str:
        """The text and the lengths of its parts."""
        train, validation = len(self.corpus.train), len(self.corpus.validation)
        return f"{self.corpus.name}: {train:,} {self.token}s to train on, {validation:,} to validate on"

    def _cross_entropy(self, outputs: Tensor, batch: Batch) -> Tensor:
        expected = (*batch["targets"].shape, self.vocabulary_size)
        if outputs.shape != expected:
            raise ValueError(f"outputs must be logits of shape {expected}, got {tuple(outputs.shape)}")
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        starts = places_in_epochs(step * batch_size, rows, self.windows_per_epoch, self._order)
        return self._windows(self.corpus.train, starts)

    def _evaluation_rows(self, rows: range) -> Batch:
        return self._windows(self.corpus.validation, self._evaluation_starts[rows.start : rows.stop])

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """Return where each window of `epoch` starts, in training order."""
        draws = generator(self.seed, Stream.WINDOW_ORDER, epoch)
        used = self.windows_per_epoch * self.context_length + 1
        phase = draws.integers(min(self.context_length, len(self.corpus.train) - used + 1))
        starts: NDArray[np.int64] = phase + self.context_length * draws.permutation(self.windows_per_epoch)
        return starts

    def _windows(self, tokens: NDArray[np.uint8], starts: NDArray[np.int64]) -> Batch:
        windows = tokens[starts[:, None] + np.arange(self.context_length + 1)]
        characters = torch.from_numpy(windows).long()
        return {"inputs": characters[:, :-1].contiguous(), "targets": characters[:, 1:].contiguous()}


def _spread(tokens: int, length: int, wanted: int) -> NDArray[np.int64]:
    """Return starts of at most `wanted` windows, spread evenly over `tokens`.

    A window has `length + 1` tokens. Windows share no target: starts are at least `length` apart.
    """
    count = min(wanted, (tokens - 1) // length)
    return np.arange(count, dtype=np.int64) * (tokens - 1 - length) // max(count - 1, 1)
