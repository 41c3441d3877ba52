"""Chronos's task: predict the future's tokens from the context's.

A row holds the ids of both, context first. Ids are those of Chronos's tokenizer: a value is divided by the context's
mean absolute value and rounded to a bin; 0 marks a missing value, 1 the end.

Shapes: `B` rows, context `C`, horizon `P`, `C + 1` ids of the context and its end, `P + 1` of the future and its end.

Source: Ansari et al., *Chronos: Learning the Language of Time Series*, 2024, arXiv 2403.07815.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from paper.chronos.kernelsynth import Split, synthetic_series
from structattn import checks
from structattn.tasks.randomness import Stream, generator
from structattn.tasks.task import Batch, Task, Totals

if TYPE_CHECKING:
    from chronos import ChronosConfig

_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class ChronosDataConfig:
    """Sizes of the synthetic data, for training and evaluation.

    Raises:
        TypeError, ValueError: a field is not a positive integer.
    """

    compositions: int = 512
    """Compositions of kernels in the training set."""

    paths: int = 8
    """Series drawn from each composition."""

    length: int = 1024
    """Steps of a training series; a row is a window of it."""

    min_past: int = 60
    """Least number of known steps in a training context; the missing ones stand on the left."""

    evaluation_series: int = 256
    """Held-out series, each of its own composition and of `C + P` steps."""

    def __post_init__(self) -> None:
        for name in ("compositions", "paths", "length", "min_past", "evaluation_series"):
            checks.positive_int(name, getattr(self, name))


class ChronosTask(Task):
    """Prediction of a window's future from its context, in Chronos's tokens.

    A batch has `inputs (B, C + P + 2)`, the ids of context and future, each with its end token, and
    `targets (B, P + 1)`, the ids of the future. A model returns logits `(B, P + 1, n_tokens)` for each id of the
    future, given the context and the ids before it.

    *Training rows.* Every epoch reads the series in a random order. A row is a window of the next series that ends at
    a random step. Its context has at most `C` steps.

    *Loss.* Mean cross-entropy over the ids of the future that are not missing, including the end token, as in Chronos.

    Args:
        config: Chronos's config: lengths, bins, special ids. `model_type` must be `"seq2seq"`.
        data: sizes of the data.
        seed: seed of the training series and their order.

    Raises:
        ValueError: `seed` is out of range, a series is too short for `min_past` and the horizon, or `config` is for
            another kind of model.
    """

    name: ClassVar[str] = "chronos"
    units: ClassVar[Mapping[str, str]] = {"nats_per_token": "nats per token of the future"}

    def __init__(self, config: ChronosConfig, data: ChronosDataConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(seed)
        data = data or ChronosDataConfig()
        if config.model_type != "seq2seq" or not config.use_eos_token:
            raise ValueError(
                f"config must be of an encoder and decoder with end tokens, got model_type = {config.model_type!r}, "
                f"use_eos_token = {config.use_eos_token}"
            )
        if data.length < data.min_past + config.prediction_length:
            raise ValueError(
                f"length must be at least min_past + prediction_length = {data.min_past} + {config.prediction_length}, "
                f"got series of {data.length} steps"
            )
        if data.min_past > config.context_length:
            raise ValueError(f"min_past must be at most the context of {config.context_length}, got {data.min_past}")
        self.config, self.data = config, data
        self.tokenizer = config.create_tokenizer()

    @property
    def context_length(self) -> int:
        """Ids of a row, of context and future together."""
        return int(self.config.context_length + self.config.prediction_length + 2)

    @property
    def evaluation_size(self) -> int:
        """Number of held-out series."""
        return self.data.evaluation_series

    def held_out(self) -> NDArray[np.float64]:
        """Return the held-out series, `(N, C + P)`."""
        length = self.config.context_length + self.config.prediction_length
        return _held_out(self.data.evaluation_series, length)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of logits, in nats per id.

        The shape of `outputs` is `(B, P + 1, n_tokens)`.
        """
        return self._cross_entropy(outputs, batch).sum() / (batch["targets"] != self.config.pad_token_id).sum()

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return `nats ()`, the summed cross-entropy, and `tokens ()`, the number of its ids."""
        nats = self._cross_entropy(outputs, batch).double().sum()
        return {"nats": nats, "tokens": (batch["targets"] != self.config.pad_token_id).sum().double()}

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return nats per id."""
        return {"nats_per_token": (totals["nats"] / totals["tokens"]).item()}

    def _cross_entropy(self, outputs: Tensor, batch: Batch) -> Tensor:
        expected = (*batch["targets"].shape, self.config.n_tokens)
        if outputs.shape != expected:
            raise ValueError(f"outputs must be logits of shape {expected}, got {tuple(outputs.shape)}")
        ids = batch["targets"].flatten()
        return F.cross_entropy(
            outputs.flatten(0, 1).float(), ids, ignore_index=self.config.pad_token_id, reduction="none"
        )

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        series = _training_series(self.seed, self.data.compositions, self.data.paths, self.data.length)
        horizon, length = self.config.prediction_length, self.config.context_length
        windows = np.full((len(rows), length + horizon), np.nan)
        for window, row in zip(windows, rows, strict=True):
            epoch, place = divmod(step * batch_size + row, len(series))
            order = _reading_order(self.seed, epoch, len(series))
            draws = generator(self.seed, Stream.TRAINING_PROMPT, step, row)
            end = int(draws.integers(self.data.min_past, self.data.length - horizon + 1))
            known = series[order[place], max(0, end - length) : end + horizon]
            window[-len(known) :] = known
        return self._tokens(windows)

    def _evaluation_rows(self, rows: range) -> Batch:
        return self._tokens(self.held_out()[rows.start : rows.stop])

    def _tokens(self, windows: NDArray[np.float64]) -> Batch:
        """Return the batch of windows `(B, C + P)`; missing values are NaN."""
        values = torch.from_numpy(windows).float()
        context, future = values[:, : self.config.context_length], values[:, self.config.context_length :]
        read, _, scale = self.tokenizer.context_input_transform(context.contiguous())
        targets, _ = self.tokenizer.label_input_transform(future.contiguous(), scale)
        return {"inputs": torch.cat([read, targets], dim=1), "targets": targets}


@functools.lru_cache(maxsize=2)
def _training_series(seed: int, compositions: int, paths: int, length: int) -> NDArray[np.float32]:
    """Return the training series `(compositions · paths, length)`; cached."""
    each = (synthetic_series(seed, index, length, paths=paths) for index in range(compositions))
    return np.concatenate([series.astype(np.float32) for series in each])


@functools.lru_cache(maxsize=2)
def _held_out(series: int, length: int) -> NDArray[np.float64]:
    """Return the held-out series `(series, length)`, the same for every seed."""
    each = (synthetic_series(_HELD_OUT_SEED, index, length, split=Split.HELD_OUT) for index in range(series))
    return np.concatenate(list(each))


@functools.lru_cache(maxsize=2)
def _reading_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order in which an epoch reads the series."""
    return generator(seed, Stream.WINDOW_ORDER, epoch).permutation(count)
