"""Measure the training time of a run, and its speed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """A stopwatch for training time, stopped during evaluations and checkpoints.

    Args:
        seconds: training time before this call resumed the run.
        tokens: tokens trained on before.
    """

    def __init__(self, seconds: float, tokens: int) -> None:
        self._seconds = self._first_seconds = seconds
        self._first_tokens = tokens
        self._started = time.perf_counter()

    def read(self) -> float:
        """Return the training time of the run so far, in seconds."""
        now = time.perf_counter()
        self._seconds, self._started = self._seconds + now - self._started, now
        return self._seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock inside the `with` block."""
        self.read()
        yield
        self._started = time.perf_counter()

    def speed(self, tokens: int) -> float:
        """Return tokens per second since resuming; `tokens` counts the whole run."""
        return (tokens - self._first_tokens) / max(self._seconds - self._first_seconds, 1e-9)
