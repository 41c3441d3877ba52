"""Find the four files of the Electricity Transformer Temperature data.

Source: Zhou et al., *Informer*, 2021; the files are at github.com/zhouhaoyi/ETDataset under CC BY-ND 4.0.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from structattn.atomic import replacing
from structattn.disk import cache_folder

HOME = "https://github.com/zhouhaoyi/ETDataset"
_FILES = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_TIMEOUT = 30.0
_MONTH = 30 * 24


@dataclass(frozen=True)
class ETTFile:
    """Sampling rate and checksum of a file of the data set."""

    rows_per_hour: int
    sha256: str

    @property
    def borders(self) -> tuple[int, int, int]:
        """Ends of the parts: 12, 4 and 4 months of 30 days."""
        month = _MONTH * self.rows_per_hour
        return 12 * month, 16 * month, 20 * month


ETT: dict[str, ETTFile] = {
    "ETTh1": ETTFile(1, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2": ETTFile(1, "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"),
    "ETTm1": ETTFile(4, "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"),
    "ETTm2": ETTFile(4, "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"),
}
"""The files by name: hourly and quarter-hourly readings of two transformers. Public reproductions of the literature
list the same checksums."""


def default_season(data: str) -> int:
    """Return the steps of a day: an ETT file's, or 24."""
    stem = Path(data).stem
    return 24 * (ETT[stem].rows_per_hour if stem in ETT else 1)


def ett_path(name: str) -> Path:
    """Return the path of a cached file; download it if missing.

    Raises:
        ValueError: it cannot be downloaded, or its checksum is wrong; the message says where to put it by hand.
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
        raise ValueError(f"data: the file at {url} is not {name}: {fault}{by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_name(f".{path.name}.{os.getpid()}")) as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f"data: {path} cannot be written: {error.strerror or error}") from error


def _fault(name: str, content: bytes) -> str | None:
    """Return why the content is not that of `name`, or None."""
    expected, found = ETT[name].sha256, hashlib.sha256(content).hexdigest()
    return None if found == expected else f"expected SHA-256 {expected}, got {found}"
