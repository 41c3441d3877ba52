"""Draw random numbers by (seed, stream, step, row), and order epochs."""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Stream(enum.IntEnum):
    """Separate streams of random numbers under one seed."""

    WINDOW_ORDER = 1
    TRAINING_PROMPT = 2
    EVALUATION_PROMPT = 3


def generator(seed: int, stream: Stream, step: int, row: int = 0) -> np.random.Generator:
    """Return a counter-based generator (Philox) of the four arguments.

    Counters of different `(step, row)` lie 2**128 draws apart, so no two sequences overlap.
    """
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def places_in_epochs(
    first: int, rows: range, per_epoch: int, order: Callable[[int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Return entries `first + rows` of the orders of all epochs, joined.

    Epoch `e` has the `per_epoch` entries `order(e)`.
    """
    epochs, places = np.divmod(np.arange(first + rows.start, first + rows.stop), per_epoch)
    entries = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        entries[chosen] = order(epoch)[places[chosen]]
    return entries


def check_seed(seed: int) -> int:
    """Return `seed`; TypeError or ValueError unless it is in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} ({type(seed).__name__})")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}")
    return seed
