"""Describe a key-value cache: its slices and how long each is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Time that entries are kept: the sequence, a block or a window.

    Args:
        block: size of blocks; entries in the query's block are kept.
        window: number of last entries to keep, the query's own included.
        sinks: number of first entries of each row to keep besides the window; fewer than it holds.
    """

    block: int | None = None
    window: int | None = None
    sinks: int = 0

    def first_needed(self, index: int, row_start: int = 0) -> int:
        """Return the oldest index that queries from `index` on read, but for sinks.

        Args:
            index: of the query.
            row_start: index of the row's first real token, from which positions count.
        """
        if self.block is not None:
            return row_start + max(index - row_start, 0) // self.block * self.block
        return 0 if self.window is None else max(index + 1 - self.window, 0)

    def live(self, length: int) -> int:
        """Return how many of `length` tokens of an unpadded row are kept.

        A full block stays until the next token.
        """
        first = self.first_needed(length - 1)
        return length - first + min(self.sinks, first)


@dataclass(frozen=True)
class CacheSlice:
    """One slice of the cached keys or values: heads, width and retention."""

    heads: int
    width: int
    retention: Retention = Retention()

    def __str__(self) -> str:
        """Return text such as `2 x 8 in blocks of 64`."""
        text = f"{self.heads} x {self.width}"
        if self.retention.block is not None:
            return f"{text} in blocks of {self.retention.block}"
        if self.retention.window is None:
            return text
        sinks = f" with {self.retention.sinks} sinks" if self.retention.sinks else ""
        return f"{text} in a window of {self.retention.window}{sinks}"


@dataclass(frozen=True)
class CacheLayout:
    """Slices of a layer's cache.

    Layers can share a cache only if their layouts are equal.

    Args:
        keys: slices of the keys.
        values: slices of the values.
        dimension_major: store keys as `(B, heads, width, T)`, which `mlr_decode` reads fastest, instead of
            `(B, heads, T, width)`.
    """

    keys: tuple[CacheSlice, ...]
    values: tuple[CacheSlice, ...]
    dimension_major: bool = False

    @property
    def key_widths(self) -> list[int]:
        """Width of each slice of the keys."""
        return [part.width for part in self.keys]

    @property
    def value_widths(self) -> list[int]:
        """Width of each slice of the values."""
        return [part.width for part in self.values]

    @property
    def slices(self) -> tuple[CacheSlice, ...]:
        """Slices of keys, then of values."""
        return (*self.keys, *self.values)

    @property
    def sinks(self) -> int:
        """Number of first tokens of each row that are kept for good."""
        return max(part.retention.sinks for part in self.slices)

    def __str__(self) -> str:
        """Return the slices, such as `keys 2 x 8 in blocks of 64; values 2 x 16`."""
        return f"keys {', '.join(map(str, self.keys))}; values {', '.join(map(str, self.values))}"
