"""The clock of a run: seconds of training, and the speed that follows from them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Counts seconds from where a run was left; stopped while the run evaluates and writes.

    Args:
        seconds: seconds of the run so far.
        tokens: tokens of the run so far.
    """

    def __init__(self, seconds: float, tokens: int) -> None:
        self._seconds = self._first_seconds = seconds
        self._first_tokens = tokens
        self._started = time.perf_counter()

    def read(self) -> float:
        """Seconds of the run so far."""
        now = time.perf_counter()
        self._seconds, self._started = self._seconds + now - self._started, now
        return self._seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside does not count."""
        self.read()
        yield
        self._started = time.perf_counter()

    def speed(self, tokens: int) -> float:
        """Tokens per second since the clock was made, `tokens` being those of the run so far."""
        return (tokens - self._first_tokens) / max(self._seconds - self._first_seconds, 1e-9)
