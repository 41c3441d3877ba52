"""The four files of the Electricity Transformer Temperature data set, by name.

Source: Zhou et al., *Informer*, 2021; the files are at github.com/zhouhaoyi/ETDataset under CC BY-ND 4.0.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from structattn.cache import cache_folder

HOME = "https://github.com/zhouhaoyi/ETDataset"
_FILES = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_HEADING = b"date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"
_TIMEOUT = 30.0
_MONTH = 30 * 24


@dataclass(frozen=True)
class ETTFile:
    """What a file of the data set must be."""

    rows_per_hour: int
    rows: int
    sha256: str | None = None
    """Its checksum; where none is known, the heading and the number of rows are checked instead."""

    @property
    def borders(self) -> tuple[int, int, int]:
        """Rows where training, validation and test part end: 12, 4 and 4 months of 30 days, as in the literature."""
        month = _MONTH * self.rows_per_hour
        return 12 * month, 16 * month, 20 * month


ETT: dict[str, ETTFile] = {
    "ETTh1": ETTFile(1, 17_420, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2": ETTFile(1, 17_420),
    "ETTm1": ETTFile(4, 69_680),
    "ETTm2": ETTFile(4, 69_680),
}
"""The files by name: hourly and quarter-hourly readings of two transformers."""


def ett_path(name: str) -> Path:
    """The file called `name` in the package's cache folder; downloaded there where it is missing.

    Raises:
        ValueError: it cannot be downloaded or is not the file it should be; the message says where to put it by hand.
    """
    path = cache_folder() / "ett" / f"{name}.csv"
    if not path.exists():
        _download(name, path)
    elif fault := _fault(name, path.read_bytes()):
        raise ValueError(f"data: {path} is not the {name} of {HOME}: {fault}; delete it")
    return path


def _download(name: str, path: Path) -> None:
    url = f"{_FILES}/{name}.csv"
    by_hand = f"; get ETT-small/{name}.csv from {HOME} and put it at {path}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"data: {name} cannot be downloaded ({getattr(error, 'reason', error)}){by_hand}") from error
    if fault := _fault(name, content):
        raise ValueError(f"data: what {url} gave is not {name}: {fault}{by_hand}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"data: {path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _fault(name: str, content: bytes) -> str | None:
    """What is wrong with the content of a file, if anything is."""
    expected = ETT[name]
    if expected.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        return None if found == expected.sha256 else f"expected SHA-256 {expected.sha256}, got {found}"
    heading, *rows = content.splitlines() or [b""]
    if heading != _HEADING:
        return f"expected the heading {_HEADING.decode()}, got {heading[:80].decode(errors='replace')!r}"
    return None if len(rows) == expected.rows else f"expected {expected.rows} rows, got {len(rows)}"
