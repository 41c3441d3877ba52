"""Cut text into tokens: ASCII, characters, bytes, or Hugging Face.

Saved tokenizers are a folder: `structattn_tokenizer.json` for characters and bytes, or the files that
`save_pretrained` of a Hugging Face tokenizer writes.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import os
import shutil
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structattn import checks
from structattn.tasks import characters

NAMES = ("characters", "bytes", "ascii")
"""Tokenizers by name; every other spelling is a path."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files of which a folder with a Hugging Face tokenizer has one."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Text of a token that stands for no known character."""

_OWN_FILE = "structattn_tokenizer.json"
_PIECE = 1 << 20


class Vocabulary(abc.ABC):
    """Tokens in `[0, size)` that stand for text."""

    token: ClassVar[str]
    """Name of one token: `character`, `byte` or `token`."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of tokens of the vocabulary."""


class Tokenizer(Vocabulary):
    """Maps text to tokens in `[0, size)` and back."""

    @abc.abstractmethod
    def encode(self, text: str) -> NDArray[Any]:
        """Return the tokens of `text`, integers `(tokens,)`."""

    @abc.abstractmethod
    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of `tokens`, `(tokens,)`."""


class AsciiTokenizer(Tokenizer):
    """The fixed table of `structattn.tasks.characters`: newline and printable ASCII.

    It changes the text, so losses on it are no losses on the bytes of the text.
    """

    token: ClassVar[str] = "character"
    size = len(characters.VOCABULARY)

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Return the tokens of `text`, with other characters mapped or dropped."""
        return characters.encode(text)

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of `tokens`."""
        return characters.decode(tokens)


class TextTokenizer(Tokenizer):
    """Tokenizer that keeps the text, counts bytes, and can be saved."""

    @property
    def unknown(self) -> int | None:
        """Token of what the vocabulary lacks; None where nothing needs it."""
        return None

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """Hexadecimal number that differs if the tokens of some text may differ."""

    @abc.abstractmethod
    def encode_with_bytes(self, text: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return tokens and the UTF-8 bytes of each, which sum to `text`'s."""

    @abc.abstractmethod
    def _write(self, folder: Path) -> None:
        """Write the tokenizer's files into an empty folder."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, each file completely or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".tokenizer.{uuid.uuid4().hex}"
        partial.mkdir()
        try:
            self._write(partial)
            # `tokenizer.json` last: it says that the others are there.
            for path in sorted(partial.iterdir(), key=lambda path: path.name == TOKENIZER_FILES[0]):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class CharacterTokenizer(TextTokenizer):
    """The characters of a text, by code point.

    The last token stands for every other character.

    Args:
        vocabulary: the characters.

    Raises:
        ValueError: there are none.
    """

    token: ClassVar[str] = "character"

    def __init__(self, vocabulary: str) -> None:
        self.vocabulary = "".join(sorted(set(checks.text("vocabulary", vocabulary))))
        self._code_points = _code_points(self.vocabulary)

    @property
    def size(self) -> int:
        """Number of characters, and one for all others."""
        return len(self.vocabulary) + 1

    @property
    def unknown(self) -> int:
        """Token of every other character, the last."""
        return len(self.vocabulary)

    @property
    def digest(self) -> str:
        """Digest of the characters."""
        return _digest(f"characters {self.vocabulary}")

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token of each character of `text`."""
        points = _code_points(text)
        places = np.searchsorted(self._code_points, points)
        known = self._code_points[np.minimum(places, self.unknown - 1)] == points
        return np.where(known, places, self.unknown)

    def encode_with_bytes(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return tokens and bytes; an unknown character counts its own bytes."""
        return self.encode(text), _widths(text)

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of `tokens`, the unknown one as `UNKNOWN`."""
        known = self.vocabulary + UNKNOWN
        return "".join(map(known.__getitem__, np.asarray(tokens).tolist()))

    def _write(self, folder: Path) -> None:
        _write_own(folder, {"kind": "characters", "characters": self.vocabulary})


class ByteTokenizer(TextTokenizer):
    """The 256 bytes of UTF-8."""

    token: ClassVar[str] = "byte"
    size = 256
    digest = "bytes"

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Return the bytes of `text`."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    def encode_with_bytes(self, text: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the bytes of `text`, and a 1 for each."""
        tokens = self.encode(text)
        return tokens, np.ones(len(tokens), dtype=np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of `tokens`, with `UNKNOWN` where they are not UTF-8."""
        return bytes(np.asarray(tokens).tolist()).decode("utf-8", "replace")

    def _write(self, folder: Path) -> None:
        _write_own(folder, {"kind": "bytes"})


class HuggingFaceTokenizer(TextTokenizer):
    """A tokenizer of Hugging Face, without its special tokens.

    Args:
        tokenizer: of transformers, backed by the library `tokenizers`.
    """

    token: ClassVar[str] = "token"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = max(tokenizer.get_vocab().values()) + 1

    @property
    def size(self) -> int:
        """Largest token plus 1."""
        return self._size

    @functools.cached_property
    def digest(self) -> str:
        """Digest of vocabulary and rules."""
        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
        return _digest(json.dumps(rules, sort_keys=True))

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of `text`."""
        return self.encode_with_bytes(text)[0]

    def encode_with_bytes(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of `text` and the UTF-8 bytes of each.

        Text between two tokens, such as a space, counts for the second.
        """
        pieces = [self._encode_piece(piece) for piece in _pieces(text)]
        tokens, widths = zip(*pieces, strict=True) if pieces else ((), ())
        nothing = np.empty(0, dtype=np.int64)
        return np.concatenate([nothing, *tokens]), np.concatenate([nothing, *widths])

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of `tokens`."""
        text: str = self._tokenizer.decode(np.asarray(tokens).tolist(), clean_up_tokenization_spaces=False)
        return text

    def _encode_piece(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = np.array(encoded["input_ids"], dtype=np.int64)
        if not tokens.size:
            return tokens, tokens
        bytes_before = np.concatenate([[0], np.cumsum(_widths(text))])
        # The tokens of one character's bytes all end where it ends: the first of them counts it.
        ends = np.maximum.accumulate(bytes_before[[end for _, end in encoded["offset_mapping"]]])
        ends[-1] = bytes_before[-1]
        return tokens, np.diff(ends, prepend=0)

    def _write(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def read_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name or path.

    Args:
        name: `bytes`, `ascii`, the folder of a saved tokenizer, or a `tokenizer.json`.

    Raises:
        ValueError: there is no tokenizer, or it cannot be read. `characters` need a text: see
            `structattn.tasks.corpus.load_tokenizer`.
        ImportError: it is one of Hugging Face, and transformers is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "ascii":
        return AsciiTokenizer()
    path = Path(name).expanduser()
    if (path / _OWN_FILE).is_file():
        return _read_own(path / _OWN_FILE)
    if path.is_file() or any((path / file).is_file() for file in TOKENIZER_FILES):
        return _read_hugging_face(path)
    if path.is_dir():
        raise ValueError(f"tokenizer: the folder {path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    raise ValueError(
        f"tokenizer must be {', '.join(NAMES)}, or the folder or file of a Hugging Face tokenizer, "
        f"got {name!r}{checks.did_you_mean(name, NAMES)}"
    )


def saved_tokenizer(folder: Path) -> str:
    """Return the path of the tokenizer saved in `folder`, or `ascii`."""
    there = any((folder / name).is_file() for name in (_OWN_FILE, *TOKENIZER_FILES))
    return str(folder) if there else "ascii"


def _read_hugging_face(path: Path) -> HuggingFaceTokenizer:
    transformers = checks.require("transformers", "hf")
    try:
        described = path.is_dir() and any((path / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        if path.is_file() or ((path / "tokenizer.json").is_file() and not described):
            file = path if path.is_file() else path / "tokenizer.json"
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            # Download nothing, and run no code of the folder.
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The libraries raise bare Exceptions for damaged files.
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise ValueError(f"tokenizer: {path} cannot be read as a Hugging Face tokenizer: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: {path} must be backed by the library tokenizers, which says where each token ends, "
            f"got {type(tokenizer).__name__}"
        )
    if not tokenizer.get_vocab():
        raise ValueError(f"tokenizer: {path} has no vocabulary")
    return HuggingFaceTokenizer(tokenizer)


def _write_own(folder: Path, plain: dict[str, str]) -> None:
    (folder / _OWN_FILE).write_text(json.dumps(plain) + "\n", encoding="utf-8")


def _read_own(path: Path) -> TextTokenizer:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return ByteTokenizer() if plain["kind"] == "bytes" else CharacterTokenizer(plain["characters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer: {path} is damaged: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """Yield `text` in pieces of at most 1 Mi characters.

    A tokenizer takes many times the memory of its text. A piece is cut after a line where it has one.
    """
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _widths(text: str) -> NDArray[np.int64]:
    """Return the bytes of UTF-8 of each character."""
    points = _code_points(text)
    widths = np.ones(len(points), dtype=np.int64)
    for limit in (0x80, 0x800, 0x10000):
        widths += points >= limit
    return widths


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
