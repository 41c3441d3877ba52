"""Write a part's JSON after every row, so that interrupted runs count."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Setup
from benchmarks.gpu.workers import Job
from benchmarks.output import Row, write_json


class Record:
    """The JSON of one part.

    Args:
        part: name of the part.
        path: the file.
        setup: device and options.
    """

    def __init__(self, part: str, path: Path, setup: Setup) -> None:
        self.path = path
        self._start = time.monotonic()
        self.document: dict[str, Any] = {
            "part": part,
            "rehearsal": setup.rehearse,
            "finished": False,
            "seconds": 0.0,
            **setup.facts(),
            "rows": [],
            "not_run": [],
        }
        self.write()

    def add(self, job: Job, row: Row) -> Row:
        """Append a row, write the file, and return the row as written."""
        row = {"case": job.name, **job.about, **row, "at_second": round(time.monotonic() - self._start, 1)}
        self.document["rows"].append(row)
        self.write()
        return row

    def write(self) -> None:
        """Write the file whole."""
        self.document["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self.document, self.path)
