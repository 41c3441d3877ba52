"""Predict every token of a window from those before it.

Shapes: `B` windows of `T` tokens, vocabulary of `V` (`structattn.tasks.tokenizers`). Source of the setting: arXiv
2509.07963, section 5.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from structattn.tasks.corpus import Corpus, load_corpus, load_tokenizer
from structattn.tasks.profiles.language import LanguageConfig
from structattn.tasks.randomness import Stream, generator, places_in_epochs
from structattn.tasks.task import Batch, Task, Totals
from structattn.tasks.tokenizers import AsciiTokenizer, TextTokenizer, Vocabulary


class LanguageTask(Task):
    """Windows of a corpus, and the cross-entropy of each next token.

    A batch has `inputs (B, T)` and `targets (B, T)`, int64; `targets[b, t]` is the token after
    `inputs[b, t]`. A model returns logits `(B, T, V)`. Evaluation batches also have `target_bytes (B, T)`, the bytes of
    UTF-8 that each target stands for; those of the ASCII table have none, since it changes the text.

    *Training order.* The training part is cut into windows at a random phase and every window is read once, in a
    random order; then it is cut and shuffled again. Row `n` of step `s` is window `s · batch_size + n` of that
    endless sequence, so the sequence is the same for every batch size, number of processes and structure.

    *Evaluation.* Windows that do not overlap, spread evenly over the validation part.

    *Loss.* Mean cross-entropy in nats per token. Summed over the evaluated targets and divided by their bytes and by
    ln 2, it is bits per byte, which compare across tokenizers.

    Args:
        config: text, tokenizer and window length.
        seed: selects the training order.
        corpus: tokens to use in place of `config.data`.
        cache: folder of token files, see `load_corpus`.
        tokenizer: to use in place of `config.tokenizer`; that of `corpus` where one is given, by default the ASCII
            table.

    Raises:
        ValueError: as `load_tokenizer` and `load_corpus`, or a part of the corpus is shorter than a window and the
            token after it.
    """

    name: ClassVar[str] = "language"

    def __init__(
        self,
        config: LanguageConfig,
        *,
        seed: int = 0,
        corpus: Corpus | None = None,
        cache: str | os.PathLike[str] | None = None,
        tokenizer: Vocabulary | None = None,
    ) -> None:
        super().__init__(seed)
        self.config = config
        if tokenizer is None:
            tokenizer = AsciiTokenizer() if corpus is not None else load_tokenizer(config.tokenizer, config.data, cache)
        self.tokenizer = tokenizer
        self.corpus = load_corpus(config.data, cache, tokenizer) if corpus is None else corpus
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
    def token(self) -> str:
        """Name of one token, such as `character`."""
        return self.tokenizer.token

    @property
    def vocabulary_size(self) -> int:
        """Width `V` of a model's logits."""
        return self.tokenizer.size

    @property
    def units(self) -> Mapping[str, str]:
        """Unit of every metric: nats per token, then bits per byte.

        Bits per byte need a tokenizer that keeps the text.
        """
        nats = {f"nats_per_{self.token}": f"nats per {self.token}"}
        bits = {"bits_per_character": "bits per character"} if self.token == "character" else {}
        return nats | bits | ({} if self.corpus.validation_bytes is None else {"bits_per_byte": "bits per byte"})

    @property
    def context_length(self) -> int:
        """Tokens `T` of a window."""
        return self.config.context_length

    @property
    def evaluation_size(self) -> int:
        """Windows of the held-out set."""
        return len(self._evaluation_starts)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of logits `(B, T, V)`, in nats."""
        return self._cross_entropy(outputs, batch).mean()

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return summed `nats ()`, and the number of targets and of `bytes ()`.

        The number of targets is called `characters ()`, `bytes ()` or `tokens ()`. Bytes are those of the targets,
        where the batch has them.
        """
        nats = self._cross_entropy(outputs, batch).double().sum()
        totals = {"nats": nats, f"{self.token}s": nats.new_tensor(batch["targets"].numel())}
        return totals | ({"bytes": batch["target_bytes"].sum().double()} if "target_bytes" in batch else {})

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return the metrics of `units`; bits are nats over ln 2."""
        nats = (totals["nats"] / totals[f"{self.token}s"]).item()
        values = {f"nats_per_{self.token}": nats, "bits_per_character": nats / math.log(2)}
        if "bytes" in totals:
            values["bits_per_byte"] = (totals["nats"] / totals["bytes"]).item() / math.log(2)
        return {name: values[name] for name in self.units}

    @property
    def data_summary(self) -> str:
        """Text, lengths of its parts, and vocabulary unless it is ASCII."""
        train, validation = len(self.corpus.train), len(self.corpus.validation)
        summary = f"{self.corpus.name}: {train:,} {self.token}s to train on, {validation:,} to validate on"
        if not isinstance(self.tokenizer, TextTokenizer):
            return summary
        summary += f", a vocabulary of {self.vocabulary_size:,}"
        if self.tokenizer.unknown is None:
            return summary
        unknown = np.count_nonzero(self.corpus.validation == self.tokenizer.unknown)
        return summary + (f"; {unknown:,} unknown {self.token}s to validate on" if unknown else "")

    def _cross_entropy(self, outputs: Tensor, batch: Batch) -> Tensor:
        expected = (*batch["targets"].shape, self.vocabulary_size)
        if outputs.shape != expected:
            raise ValueError(f"outputs must be logits of shape {expected}, got {tuple(outputs.shape)}")
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        starts = places_in_epochs(step * batch_size, rows, self.windows_per_epoch, self._order)
        return self._windows(self.corpus.train, starts)

    def _evaluation_rows(self, rows: range) -> Batch:
        starts = self._evaluation_starts[rows.start : rows.stop]
        batch = self._windows(self.corpus.validation, starts)
        if (widths := self.corpus.validation_bytes) is not None:
            places = starts[:, None] + 1 + np.arange(self.context_length)
            batch["target_bytes"] = torch.from_numpy(widths[places].astype(np.int64))
        return batch

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """Return where each window of `epoch` starts, in training order."""
        draws = generator(self.seed, Stream.WINDOW_ORDER, epoch)
        used = self.windows_per_epoch * self.context_length + 1
        phase = draws.integers(min(self.context_length, len(self.corpus.train) - used + 1))
        starts: NDArray[np.int64] = phase + self.context_length * draws.permutation(self.windows_per_epoch)
        return starts

    def _windows(self, tokens: NDArray[Any], starts: NDArray[np.int64]) -> Batch:
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.context_length + 1)].astype(np.int64))
        return {"inputs": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}


def _spread(tokens: int, length: int, wanted: int) -> NDArray[np.int64]:
    """Return starts of at most `wanted` windows, spread evenly over `tokens`.

    A window has `length + 1` tokens. Windows share no target: starts are at least `length` apart.
    """
    count = min(wanted, (tokens - 1) // length)
    return np.arange(count, dtype=np.int64) * (tokens - 1 - length) // max(count - 1, 1)
