"""Encode text as newlines and the 95 printable characters of ASCII.

Every other character is mapped or dropped:

- line ends (`\\r\\n`, `\\r`, and the Unicode line and paragraph separators) become newlines; a tab becomes four
  spaces; every other space (no-break, thin, ideographic, …) becomes one space;
- curly, low and angle quotes become `"` or `'`, and so do primes and the lone acute accent; hyphens and the short
  dash become `-`, the long dash `--`; bullets become `*`; `…` becomes `...`;
- letters with marks lose the marks and ligatures come apart, by Unicode's compatibility decomposition (`é` is
  `e`, `ﬁ` is `fi`, `½` is `1/2`); a few letters that have none are spelt out (`æ` is `ae`, `ß` is `ss`);
- the rest (other scripts, symbols, control characters) is dropped.

Tokens are numbered in the order of the code points: newline is 0, space is 1, … `~` is 95.
"""

from __future__ import annotations

import functools
import re
import unicodedata

import numpy as np
from numpy.typing import ArrayLike, NDArray

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
"""Every character of the vocabulary, at the index of its token."""

NEWLINE = 0
"""The token of a newline."""

_OUTSIDE = re.compile(r"[^\n -~]")
_TO_TOKEN = bytes(max(VOCABULARY.find(chr(code)), 0) for code in range(256))
_SPELLINGS = {
    "\t": "    ",
    **dict.fromkeys("\r\x85\u2028\u2029", "\n"),
    **dict.fromkeys("‘’‚‛‹›′´ʹʻʼ", "'"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **dict.fromkeys("•‣·●", "*"),
    "⁄": "/",
    "×": "x",
    **dict(zip("ØøŁłĐđÐðı", "OoLlDdDdi", strict=True)),
    **dict(zip("ÆæŒœßẞÞþ", ["AE", "ae", "OE", "oe", "ss", "SS", "Th", "th"], strict=True)),
}


def encode(text: str) -> NDArray[np.uint8]:
    """Return the tokens of `text` in a new array, spelt as above."""
    plain = _OUTSIDE.sub(lambda match: _spell(match[0]), text.replace("\r\n", "\n"))
    # bytes.translate is the table lookup. torch wants writable memory, hence the bytearray.
    return np.frombuffer(bytearray(plain.encode("ascii").translate(_TO_TOKEN)), dtype=np.uint8)


def decode(tokens: ArrayLike) -> str:
    """Return the text of `tokens`; inverts `encode` on the vocabulary.

    Args:
        tokens: integers in [0, 96), in an array, a list or a CPU tensor of one dimension.

    Raises:
        ValueError: `tokens` has not one dimension, or a value is not a token.
    """
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens must have one dimension, got shape {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() < len(VOCABULARY)):
        raise ValueError(f"tokens must be at least 0 and below {len(VOCABULARY)}, got {array.min()} to {array.max()}")
    return "".join(map(VOCABULARY.__getitem__, array.tolist()))


@functools.cache
def _spell(character: str) -> str:
    """Return the spelling of a character outside the vocabulary; empty without one."""
    if character in _SPELLINGS:
        return _SPELLINGS[character]
    if unicodedata.category(character) == "Zs":
        return " "
    parts = unicodedata.normalize("NFKD", character)
    if parts == character:
        return ""
    return "".join(part if part in VOCABULARY else _spell(part) for part in parts)
