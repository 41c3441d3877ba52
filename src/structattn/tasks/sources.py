"""Read texts: Python's standard library, files, or OpenWebText.

A source is a sequence of documents in a fixed order, with a digest that changes when a document does. Documents are
read in pieces, so that a large file is never held in memory as text.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from structattn import checks

_PIECE = 1 << 20
_HUB_NAME = "Skylion007/openwebtext"
_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Source(Protocol):
    """A sequence of documents in a fixed order."""

    @property
    def name(self) -> str:
        """Text that the user asked for, for messages and records."""

    @property
    def holds_out_documents(self) -> bool:
        """True if validation is whole documents, not ends of documents."""

    def digest(self) -> str:
        """Return a hexadecimal number that differs if the documents differ."""

    def documents(self) -> Iterator[Iterable[str]]:
        """Yield the text of each document, in pieces, with `\\n` line ends."""


def open_source(data: str) -> Source:
    """Return the source that `data` names.

    - `stdlib`: the `.py` files of the running Python's standard library, sorted by path. Its tests are left out: they
      are longer than the library, hold tables and broken files, and are missing from many distributions of Python.
    - `openwebtext`, or `openwebtext:N` for its first `N` documents: through Hugging Face `datasets`.
    - a file; a folder, meaning the `.txt` files directly in it, sorted by name; a pattern such as
      `notes/**/*.md`, sorted by path. All must be UTF-8. A file called `stdlib` is reached as `./stdlib`.

    Only names and sizes of files are read.

    Raises:
        TypeError: `data` is not a string.
        ValueError: `data` is empty, nothing has that name, the folder or pattern holds no file, the file is empty, or
            the number of documents is not a positive integer.
    """
    checks.text("data", data)
    if data == "stdlib":
        return Files(data, _standard_library())
    word, colon, count = data.partition(":")
    if word == "openwebtext":
        return OpenWebText(data, _document_count(data, count) if colon else None)
    try:
        return Files(data, _find(data))
    except OSError as error:
        raise ValueError(f"data: cannot read {error.filename or data}: {error.strerror}") from error


@dataclass(frozen=True)
class Files:
    """Text files, one document each."""

    name: str
    paths: tuple[Path, ...]
    holds_out_documents: bool = False

    def digest(self) -> str:
        """Return a SHA-256 of contents and order, not of names."""
        whole = hashlib.sha256()
        for path in self.paths:
            one = hashlib.sha256()
            for piece in _read(path):
                one.update(piece)
            whole.update(one.digest())
        return whole.hexdigest()

    def documents(self) -> Iterator[Iterable[str]]:
        """Yield the text of each file; ValueError unless it is UTF-8."""
        return map(_read_text, self.paths)


@dataclass(frozen=True)
class OpenWebText:
    """The first `limit` documents of OpenWebText, streamed; None for all.

    The digest is of the name and the limit alone, so a cached corpus needs no network.
    """

    name: str
    limit: int | None
    holds_out_documents: bool = True

    def digest(self) -> str:
        """Return the SHA-256 of the name and the limit."""
        return hashlib.sha256(f"{_HUB_NAME} {self.limit}".encode()).hexdigest()

    def documents(self) -> Iterator[Iterable[str]]:
        """Yield the text of each document; ImportError if `datasets` is missing."""
        rows = checks.require("datasets", "corpora").load_dataset(_HUB_NAME, split="train", streaming=True)
        return ((row["text"],) for row in itertools.islice(rows, self.limit))


def _document_count(data: str, count: str) -> int:
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise ValueError(f"data must be openwebtext or openwebtext:N with N documents, got {data!r}")
    return int(count)


def _standard_library() -> tuple[Path, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_THE_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(f"data: this Python has no source of its standard library in {root}; name a file instead")
    return tuple(sorted(found, key=Path.as_posix))


def _find(data: str) -> tuple[Path, ...]:
    path = Path(data).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"data: {path} is empty")
        return (path,)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix == ".txt" and entry.is_file()]
        missing = f"data: the folder {path} holds no .txt file; for others give a pattern such as '{path}/**/*.py'"
    elif path.exists():
        raise ValueError(f"data: {path} is neither a file nor a folder")
    elif glob.has_magic(data):
        found = [entry for entry in map(Path, glob.glob(str(path), recursive=True)) if entry.is_file()]
        missing = f"data: no file matches the pattern {data!r}"
    else:
        hint = checks.did_you_mean(data, ["stdlib", "openwebtext"])
        raise ValueError(
            f"data must be stdlib, openwebtext, or an existing file, folder or pattern, got {data!r}{hint}"
        )
    if not found:
        raise ValueError(missing)
    return tuple(sorted(found, key=Path.as_posix))


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror or error}") from error


def _read_text(path: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    end = 0
    for piece in itertools.chain(_read(path), [b""]):
        if (place := piece.find(b"\0")) >= 0:
            raise ValueError(f"data: {path} is not text: NUL byte at byte offset {end + place}")
        end += len(piece)
        try:
            # The empty piece marks the end: a character cut off there is an error too.
            yield decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = end - len(error.object) + error.start
            raise ValueError(f"data: {path} is not UTF-8 text: {error.reason} at byte offset {offset}") from error
