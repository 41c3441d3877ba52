"""Define the interface of a task: data, loss and metrics.

A task keeps no state: row `n` of the batch of step `s` is a pure function of `(seed, s, n)`. So a run that was killed
resumes with the same tensors, any number of processes share a batch by taking disjoint rows of it, and two models
trained with one seed see the same data in the same order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from structattn import checks
from structattn.tasks.randomness import check_seed

Batch = dict[str, Tensor]
"""CPU tensors `inputs`, which the model reads, and `targets`, which it should predict."""

Totals = dict[str, Tensor]
"""Sums over examples (float64), added over batches and over processes before `Task.metrics`."""


class TaskConfig(Protocol):
    """A frozen dataclass of the settings of a task."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""


class Task(abc.ABC):
    """Data, loss and metrics of one task.

    A training step is `loss = task.loss(model(batch["inputs"]), batch)` with `batch = task.batch(step, size)`.
    An evaluation adds up `task.totals(model(batch["inputs"]), batch)` over `task.evaluation_batches(size)`
    and calls `task.metrics` on the sums.

    Args:
        seed: selects the training data and its order. The held-out set is the same for every seed.

    Raises:
        ValueError: `seed` is negative or does not fit 64 bits.
    """

    name: ClassVar[str]
    """Name of the task in configs, file names and tables."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_seed(seed)

    @property
    @abc.abstractmethod
    def units(self) -> Mapping[str, str]:
        """Unit of every metric by its name.

        Structures are ranked by the first metric; lower is better.
        """

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Tokens of the longest sequence that a model is given."""

    def sequence_length(self, step: int) -> int:
        """Return the tokens of each sequence of the batch of `step`."""
        return self.context_length

    def batch(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of a training step that one process works on.

        The `batch_size` rows of a step are the same however many processes share them. Gradient accumulation splits
        in the same way: micro-batch `m` of `M` on process `p` of `P` is rank `p * M + m` of `P * M`.

        Args:
            step: training step, counted from 0.
            batch_size: rows of the whole step, over all processes.
            rank: the part to return.
            world_size: number of equal parts of the batch.

        Returns:
            `inputs` and `targets` with `batch_size / world_size` rows.

        Raises:
            ValueError: `step` is negative, `rank` is not below `world_size`, or `batch_size` is no multiple
                of `world_size`.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        _check_rank(rank, world_size)
        share, rest = divmod(checks.positive_int("batch_size", batch_size), world_size)
        if rest:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {batch_size}")
        return self._training_rows(step, batch_size, range(rank * share, (rank + 1) * share))

    def evaluation_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Return the batches of the held-out set that one process works on.

        Each has at most `batch_size` rows. The set depends neither on the seed nor on the batch size. Parts of
        different ranks are disjoint, cover the set, and differ by at most one row, so they may differ by one batch.

        Raises:
            ValueError: `batch_size` is not positive or `rank` is not below `world_size`.
        """
        checks.positive_int("batch_size", batch_size)
        _check_rank(rank, world_size)
        first, end = (part * self.evaluation_size // world_size for part in (rank, rank + 1))
        starts = range(first, end, batch_size)
        return (self._evaluation_rows(range(start, min(start + batch_size, end))) for start in starts)

    def test(self) -> Task | None:
        """Return the task on its test part, for finished runs, or None."""
        return None

    @property
    @abc.abstractmethod
    def evaluation_size(self) -> int:
        """Rows of the held-out set, over all processes."""

    @abc.abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of `outputs`, a float32 scalar."""

    @abc.abstractmethod
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return sums over the rows of `batch`, without gradient."""

    @abc.abstractmethod
    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return the metrics in `units` from totals of the held-out set."""

    @property
    def data_summary(self) -> str:
        """Data in one line, for reports."""
        return self.name

    def examples(self) -> list[dict[str, Any]]:
        """Return held-out examples for figures, as JSON-compatible values."""
        return []

    def example_predictions(self, predict: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return predictions on `examples`, to store beside the metrics."""
        return {}

    @abc.abstractmethod
    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        """Return rows `rows` of the batch of `step`."""

    @abc.abstractmethod
    def _evaluation_rows(self, rows: range) -> Batch:
        """Return rows `rows` of the held-out set."""


def _check_rank(rank: int, world_size: int) -> None:
    checks.positive_int("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size {world_size}, got {rank}")
