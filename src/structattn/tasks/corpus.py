"""Tokenise a text into cached, memory-mapped training and validation parts.

*Split.* The last 5% of the characters of every file are validation (rounded down), so both parts hold every book
or module. OpenWebText has short documents: there every twentieth document is validation. Newlines at either end of a
document are removed first, and the parts of successive documents are joined with one blank line.

*Cache.* `<digest>.train.u8` and `<digest>.validation.u8`, raw uint8 tokens, under the folder of
`cache_folder`. The digest is of the contents, so an edited file is read again and a moved one is not. Files are
written completely or not at all, and processes that build the same corpus at once write the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from structattn.atomic import replacing
from structattn.disk import cache_folder
from structattn.tasks.characters import NEWLINE, encode
from structattn.tasks.sources import Source, open_source

_logger = logging.getLogger(__name__)

_FORMAT = 1  # Raise it when the mapping of characters or the split changes, so that old caches are not read.
_BLANK_LINE = bytes([NEWLINE, NEWLINE])
_FEW = 0.8
_HELD_OUT = 20  # One character or document in so many is validation.


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text, `uint8` in [0, 96)."""

    name: str
    """The text that was asked for, such as `stdlib`."""

    digest: str
    """Digest of the text, the split and the mapping; equal digests mean equal tokens."""

    train: NDArray[np.uint8]
    """Tokens to train on, `(characters,)`."""

    validation: NDArray[np.uint8]
    """Tokens to evaluate on, `(characters,)`."""


def load_corpus(data: str, cache: str | os.PathLike[str] | None = None) -> Corpus:
    """Return the tokens of a text, from the cache if possible.

    Several processes may call this at once; each builds what the cache lacks. Where that is expensive (OpenWebText),
    let one of them call first.

    Args:
        data: `stdlib`, `openwebtext`, `openwebtext:N`, or a file, folder or pattern; see `open_source`.
        cache: folder of token files; by default `cache_folder()`.

    Returns:
        The corpus, memory-mapped read-only.

    Raises:
        ValueError: `data` names nothing, or a file that is empty, cannot be read, is not UTF-8 text or holds no
            character of the vocabulary; or the cache folder cannot be written.
        ImportError: `data` is `openwebtext`, is not cached, and `datasets` is not installed.
    """
    source = open_source(data)
    digest = hashlib.sha256(f"{_FORMAT} {source.digest()}".encode()).hexdigest()[:32]
    folder = cache_folder() if cache is None else Path(cache)
    train, validation = (folder / f"{digest}.{part}.u8" for part in ("train", "validation"))
    if not (train.is_file() and validation.is_file()):
        _build(source, train, validation)
    return Corpus(data, digest, _memory_map(train), _memory_map(validation))


def split(tokens: NDArray[Any], index: int, source: Source) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return training and validation part of document `index`; either may be empty."""
    if source.holds_out_documents:
        end = 0 if index % _HELD_OUT == _HELD_OUT - 1 else len(tokens)
    else:
        end = len(tokens) - len(tokens) // _HELD_OUT
    return tokens[:end], tokens[end:]


def _build(source: Source, train_path: Path, validation_path: Path) -> None:
    """Write both parts completely, or neither."""
    read = kept = 0
    with _replacing(train_path) as train, _replacing(validation_path) as validation:
        for index, document in enumerate(source.documents()):
            characters, tokens = _tokens(document)
            read, kept = read + characters, kept + len(tokens)
            for file, part in zip((train, validation), split(tokens, index, source), strict=True):
                _append(file, part)
        if not kept:
            raise ValueError(f"data: {source.name} holds no character of the vocabulary")
    if kept < _FEW * read:
        _logger.warning(
            "data: of the %d characters of %s only %d are left after mapping to printable ASCII",
            read, source.name, kept,
        )  # fmt: skip


def _tokens(document: Iterable[str]) -> tuple[int, NDArray[np.uint8]]:
    """Return the length of `document`, and its tokens without outer newlines."""
    characters, pieces = 0, [np.empty(0, dtype=np.uint8)]
    for text in document:
        characters += len(text)
        pieces.append(encode(text))
    tokens = np.concatenate(pieces)
    inner = np.flatnonzero(tokens != NEWLINE)
    return characters, tokens[inner[0] : inner[-1] + 1] if inner.size else tokens[:0]


def _append(file: BinaryIO, tokens: NDArray[np.uint8]) -> None:
    if tokens.size:
        file.write((_BLANK_LINE if file.tell() else b"") + tokens.tobytes())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a cache file that becomes `path` when the block ends."""
    # Processes that build one corpus at once each write a file of their own.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(replacing(path, partial))
        except OSError as error:
            raise ValueError(
                f"the cache folder {path.parent} cannot be written: {error.strerror}; set STRUCTATTN_CACHE to another"
            ) from error
        yield file


def _memory_map(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # An empty file cannot be mapped.
        return np.empty(0, dtype=np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
