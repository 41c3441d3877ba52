"""Tokenise a text into cached, memory-mapped training and validation parts.

*Split.* The last 5% of the characters of every file are validation (rounded down), so both parts hold every book
or module. OpenWebText has short documents: there every twentieth document is validation. Newlines at either end of a
document are removed first, and the parts of successive documents are joined with one blank line.

The parts are cut in the text, so that they are the same for every tokenizer; the ASCII table maps the text first.

*Cache.* `<digest>.train.u8` and `<digest>.validation.u8`, raw uint8 tokens, under the folder of
`cache_folder`; u16 or u32 for larger vocabularies, and `<digest>.bytes.u32` for the bytes of each validation token.
The digest is of the contents and the tokenizer, so an edited file is read again and a moved one is not. Files are
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
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from structattn.atomic import replacing
from structattn.disk import cache_folder
from structattn.tasks.characters import NEWLINE, encode
from structattn.tasks.sources import Source, open_source
from structattn.tasks.tokenizers import (
    AsciiTokenizer,
    CharacterTokenizer,
    TextTokenizer,
    Tokenizer,
    Vocabulary,
    read_tokenizer,
)

_logger = logging.getLogger(__name__)

_FORMAT = 1  # Raise it when the mapping of characters or the split changes, so that old caches are not read.
_BLANK_LINE = bytes([NEWLINE, NEWLINE])
_JOINT = "\n\n"
_UINT8 = np.dtype(np.uint8)
_LEAST_KEPT = 0.8  # Warn where a smaller share of the characters is in the vocabulary.
_HELD_OUT = 20  # One in 20 characters or documents is validation.


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text, unsigned integers."""

    name: str
    """The text that was asked for, such as `stdlib`."""

    digest: str
    """Digest of the text, the split and the tokenizer; equal digests mean equal tokens."""

    train: NDArray[Any]
    """Tokens to train on, `(tokens,)`."""

    validation: NDArray[Any]
    """Tokens to evaluate on, `(tokens,)`."""

    validation_bytes: NDArray[np.uint32] | None = None
    """Bytes of UTF-8 that each validation token stands for, `(tokens,)`; None for the ASCII table."""


def load_tokenizer(name: str, data: str, cache: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return a tokenizer by name or path.

    `characters` are those of the training part of `data`.

    Args:
        name: `characters`, or as `read_tokenizer`.
        data: text, as for `load_corpus`.
        cache: folder of token files; by default `cache_folder()`. It keeps the characters of a text.

    Raises:
        ValueError, ImportError: as `read_tokenizer` and `load_corpus`.
    """
    if name != "characters":
        return read_tokenizer(name)
    source = open_source(data)
    path = _folder(cache) / f"{_digest(source, 'vocabulary')}.characters"
    if not path.is_file():
        characters: set[str] = set()
        for part in filter(None, (train for train, _ in _texts(source))):
            characters.update(_JOINT if characters else "", part)
        if not characters:
            raise ValueError(f"data: the training part of {source.name} has no characters")
        with _replacing(path) as file:
            file.write("".join(sorted(characters)).encode("utf-8", "surrogatepass"))
    return CharacterTokenizer(path.read_bytes().decode("utf-8", "surrogatepass"))


def load_corpus(data: str, cache: str | os.PathLike[str] | None = None, tokenizer: Vocabulary | None = None) -> Corpus:
    """Return the tokens of a text, from the cache if possible.

    Several processes may call this at once; each builds what the cache lacks. Where that is expensive (OpenWebText),
    let one of them call first.

    Args:
        data: `stdlib`, `openwebtext`, `openwebtext:N`, or a file, folder or pattern; see `open_source`.
        cache: folder of token files; by default `cache_folder()`.
        tokenizer: by default the ASCII table.

    Returns:
        The corpus, memory-mapped read-only.

    Raises:
        ValueError: `data` names nothing, or a file that is empty, cannot be read, is not UTF-8 text or holds no
            character of the vocabulary (the training part, for `characters`); or the cache folder cannot be written.
        ImportError: `data` is `openwebtext`, is not cached, and `datasets` is not installed.
    """
    source = open_source(data)
    folder = _folder(cache)
    if isinstance(tokenizer, TextTokenizer):
        return _load_text(source, tokenizer, folder)
    if not isinstance(tokenizer, AsciiTokenizer | None):
        raise TypeError(f"tokenizer must be an AsciiTokenizer or a TextTokenizer, got {type(tokenizer).__name__}")
    digest = _digest(source)
    train, validation = (folder / f"{digest}.{part}.u8" for part in ("train", "validation"))
    if not (train.is_file() and validation.is_file()):
        _build(source, train, validation)
    return Corpus(data, digest, _memory_map(train), _memory_map(validation))


Text = TypeVar("Text", str, NDArray[Any])


def split(tokens: Text, index: int, source: Source) -> tuple[Text, Text]:
    """Return training and validation part of document `index`; either may be empty."""
    if source.holds_out_documents:
        end = 0 if index % _HELD_OUT == _HELD_OUT - 1 else len(tokens)
    else:
        end = len(tokens) - len(tokens) // _HELD_OUT
    return tokens[:end], tokens[end:]


def _folder(cache: str | os.PathLike[str] | None) -> Path:
    return cache_folder() if cache is None else Path(cache)


def _digest(source: Source, *more: str) -> str:
    return hashlib.sha256(" ".join([str(_FORMAT), source.digest(), *more]).encode()).hexdigest()[:32]


# --- any text ---------------------------------------------------------------------------------------------------------


def _load_text(source: Source, tokenizer: TextTokenizer, folder: Path) -> Corpus:
    """Return the tokens of the raw text, from the cache if possible."""
    digest = _digest(source, tokenizer.digest)
    dtype = next(np.dtype(kind) for kind in ("u1", "u2", "u4") if tokenizer.size <= np.iinfo(kind).max + 1)
    train, validation = (folder / f"{digest}.{part}.u{8 * dtype.itemsize}" for part in ("train", "validation"))
    widths = folder / f"{digest}.bytes.u32"
    if not (train.is_file() and validation.is_file() and widths.is_file()):
        _build_text(source, tokenizer, dtype, train, validation, widths)
    maps = (_memory_map(train, dtype), _memory_map(validation, dtype), _memory_map(widths, np.dtype("u4")))
    return Corpus(source.name, digest, *maps)


def _build_text(
    source: Source,
    tokenizer: TextTokenizer,
    dtype: np.dtype[Any],
    train_path: Path,
    validation_path: Path,
    widths: Path,
) -> None:
    """Write both parts and the widths completely, or none."""
    with _replacing(train_path) as train, _replacing(validation_path) as validation, _replacing(widths) as sizes:
        for train_text, validation_text in _texts(source):
            if train_text:
                joint = _JOINT if train.tell() else ""
                train.write(tokenizer.encode(joint + train_text).astype(dtype).tobytes())
            if validation_text:
                joint = _JOINT if validation.tell() else ""
                tokens, counts = tokenizer.encode_with_bytes(joint + validation_text)
                validation.write(tokens.astype(dtype).tobytes())
                sizes.write(counts.astype(np.uint32).tobytes())
        if not (train.tell() or validation.tell()):
            raise ValueError(f"data: {source.name} has no text")


def _texts(source: Source) -> Iterator[tuple[str, str]]:
    """Yield each document's training and validation part, without its outer newlines."""
    for index, document in enumerate(source.documents()):
        yield split("".join(document).strip("\n"), index, source)


# --- the ASCII table --------------------------------------------------------------------------------------------------


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
    if kept < _LEAST_KEPT * read:
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


# --- files ------------------------------------------------------------------------------------------------------------


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


def _memory_map(path: Path, dtype: np.dtype[Any] = _UINT8) -> NDArray[Any]:
    if path.stat().st_size == 0:  # An empty file cannot be mapped.
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
