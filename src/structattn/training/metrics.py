"""metrics.jsonl: one line per evaluation, kept in step with the checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structattn.training.errors import RunFolderError

Row = dict[str, Any]
"""One evaluation: numbers, or lists of numbers, by name."""

WALL_CLOCK = ("seconds", "tokens_per_second")
"""Columns that differ between two runs of one config; all others are equal to the bit on one machine."""


class MetricsFile:
    """Lines of JSON, appended and flushed to the disk one at a time.

    A checkpoint stores `size`; a run that goes on from it calls `truncate` and so drops the lines of steps that it is
    about to repeat, and a line that was cut in the middle.

    Args:
        path: the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes written."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: a number is not finite, which JSON has no word for.
            RunFolderError: the file cannot be written.
        """
        line = json.dumps(dict(row), allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(self.path, f"the metrics cannot be written: {error.strerror}") from error

    def truncate(self, size: int) -> None:
        """Cut the file to its first `size` bytes.

        Raises:
            RunFolderError: it is shorter than that, or cannot be written.
        """
        if self.size < size:
            raise RunFolderError(self.path, f"expected at least the {size} bytes of the checkpoint, got {self.size}")
        if self.size > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise RunFolderError(self.path, f"the metrics cannot be written: {error.strerror}") from error

    def rows(self) -> list[Row]:
        """All lines, oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
