"""What a task is: data addressed by (seed, step, row), a loss, and metrics made of totals that add up.

Nothing here is an iterator with a state to save. Row `n` of the batch of step `s` is a pure function of
`(seed, s, n)`, so a run that was killed goes on at its step with the very tensors it would have seen, any
number of processes share one batch by taking disjoint rows of it, and two models trained with one seed see
the same data in the same order.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from structattn import checks

Batch = dict[str, Tensor]
"""Tensors on the CPU under two names: `inputs`, what the model reads, and `targets`, what it should predict."""

Totals = dict[str, Tensor]
"""Sums over examples (float64), to be added over batches and over processes before `Task.metrics`."""


class Task(abc.ABC):
    """Data, loss and metrics of one task; models and training know nothing else about it.

    A training step is `loss = task.loss(model(batch["inputs"]), batch)` with `batch = task.batch(step, size)`.
    An evaluation adds up `task.totals(model(batch["inputs"]), batch)` over `task.evaluation_batches(size)`
    and calls `task.metrics` on the sums.

    Args:
        seed: names the training data and its order; the evaluation set is the same for every seed.

    Raises:
        ValueError: `seed` is negative or does not fit 64 bits.
    """

    name: ClassVar[str]
    """The word for the task in configs, file names and tables."""

    units: ClassVar[Mapping[str, str]]
    """Unit of every metric by its name; the first is the one structures are compared by, lower is better."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_seed(seed)

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Tokens of the longest sequence the task feeds to a model."""

    def sequence_length(self, step: int) -> int:
        """Tokens of each sequence of the batch of `step`: what its compute is counted with."""
        return self.context_length

    def batch(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of training step `step`'s batch that process `rank` of `world_size` works on.

        The `batch_size` rows of a step are the same however many processes share them. Gradient accumulation
        is the same question: micro-batch `m` of `M` on process `p` of `P` is rank `p * M + m` of `P * M`.

        Args:
            step: training step, counted from 0.
            batch_size: rows of the whole step, over all processes.
            rank: which part to take.
            world_size: into how many equal parts the batch is cut.

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
        """The fixed held-out set in batches of at most `batch_size` rows; with ranks, this process's part.

        The set depends neither on the seed nor on the batch size. Parts of different ranks are disjoint, cover
        the set, and differ by at most one row, so they may differ by one batch.

        Raises:
            ValueError: `batch_size` is not positive or `rank` is not below `world_size`.
        """
        checks.positive_int("batch_size", batch_size)
        _check_rank(rank, world_size)
        first, end = (part * self.evaluation_size // world_size for part in (rank, rank + 1))
        starts = range(first, end, batch_size)
        return (self._evaluation_rows(range(start, min(start + batch_size, end))) for start in starts)

    def test(self) -> Task | None:
        """The same task on a test part, read once at the end of a run; None where there is the held-out set alone."""
        return None

    @property
    @abc.abstractmethod
    def evaluation_size(self) -> int:
        """Rows of the held-out set, over all processes."""

    @abc.abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The scalar that training brings down, float32, for a model's `outputs` on `batch["inputs"]`."""

    @abc.abstractmethod
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """What `batch` adds to the evaluation: sums over its rows, without gradient."""

    @abc.abstractmethod
    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Numbers for people, by the names in `units`, from totals summed over the evaluation set."""

    @abc.abstractmethod
    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        """Rows `rows` of the batch of `step`."""

    @abc.abstractmethod
    def _evaluation_rows(self, rows: range) -> Batch:
        """Rows `rows` of the held-out set."""


class Stream(enum.IntEnum):
    """Separate streams of random numbers under one seed."""

    WINDOW_ORDER = 1
    TRAINING_PROMPT = 2
    EVALUATION_PROMPT = 3


def generator(seed: int, stream: Stream, step: int, row: int = 0) -> np.random.Generator:
    """A generator whose numbers depend on these four numbers alone: a counter-based one (Philox).

    Counters of different `(step, row)` lie 2**128 draws apart, so no two sequences ever overlap.
    """
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def places_in_epochs(
    first: int, rows: range, per_epoch: int, order: Callable[[int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Entries `first + rows` of the endless sequence that `order(0)`, `order(1)`, … make, each of `per_epoch`."""
    epochs, places = np.divmod(np.arange(first + rows.start, first + rows.stop), per_epoch)
    entries = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        entries[chosen] = order(epoch)[places[chosen]]
    return entries


def check_seed(seed: int) -> int:
    """`seed` if it is an integer in [0, 2**64); TypeError or ValueError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} ({type(seed).__name__})")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}")
    return seed


def _check_rank(rank: int, world_size: int) -> None:
    checks.positive_int("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size {world_size}, got {rank}")
