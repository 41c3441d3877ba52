"""Write metrics.jsonl, one line per evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structattn.training.errors import RunFolderError

MetricsRow = dict[str, Any]
"""One evaluation: numbers, or lists of numbers, by name."""

WALL_CLOCK = ("seconds", "tokens_per_second")
"""Columns that differ between runs of one config; all others are equal to the bit on one machine."""


class MetricsFile:
    """File of JSON lines, each flushed when it is appended.

    A checkpoint stores `size`. A run that resumes from it calls `truncate`, which drops incomplete lines and those of
    steps that the run will repeat.

    Args:
        path: the file; the first `append` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            ValueError: a number is not finite, which JSON cannot express.
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
            RunFolderError: the file is shorter than that, or cannot be written.
        """
        if self.size < size:
            raise RunFolderError(self.path, f"expected at least the {size} bytes of the checkpoint, got {self.size}")
        if self.size > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise RunFolderError(self.path, f"the metrics cannot be written: {error.strerror}") from error

    def rows(self) -> list[MetricsRow]:
        """Read all lines, oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
