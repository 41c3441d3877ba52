"""The key-value cache of one attention layer: it keeps what a later query can read, and nothing else.

Shapes: B rows, Hkv key heads, T tokens read so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.layers.kv_cache.growing_buffer import Timeline


@dataclass(frozen=True)
class Reach:
    """How far back queries read: everything, their own block, or a window that ends at them.

    Args:
        block: the query's own block of so many positions.
        window: the last so many tokens, the query's own included.
    """

    block: int | None = None
    window: int | None = None

    def first_needed(self, index: int, row_start: int = 0) -> int:
        """The oldest index read by a query at `index`, or by a later one, in a row whose positions count from
        `row_start`."""
        if self.block is not None:
            return row_start + max(index - row_start, 0) // self.block * self.block
        return 0 if self.window is None else max(index + 1 - self.window, 0)


@dataclass(frozen=True)
class CachePart:
    """Keys that one kind of reading needs: `heads` of them for each token, each `width` wide."""

    heads: int
    width: int
    reach: Reach = Reach()


@dataclass(frozen=True)
class CacheLayout:
    """What a layer's cache holds; two layers can share a cache's numbers only where their layouts are equal.

    Args:
        keys: the parts that keys come in.
        value: heads, width and reach of the values.
        dimension_major: keys as `(B, heads, width, T)`, the layout `mlr_decode` reads fastest, rather than
            `(B, heads, T, width)`.
    """

    keys: tuple[CachePart, ...]
    value: CachePart
    dimension_major: bool = False

    def __str__(self) -> str:
        """Such as `keys 2 x 8, 2 x 8 in blocks of 64; values 2 x 16`."""
        return f"keys {', '.join(map(_describe, self.keys))}; values {_describe(self.value)}"


def _describe(part: CachePart) -> str:
    kind = ""
    if part.reach.block is not None:
        kind = f" in blocks of {part.reach.block}"
    elif part.reach.window is not None:
        kind = f" in a window of {part.reach.window}"
    return f"{part.heads} x {part.width}{kind}"


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as the attention op casts it under autocast, so that what is read from a cache was rounded alike."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class KeyValueCache:
    """Keys and values of the tokens that one attention layer has read, for generation without gradients.

    For MLR attention level 1 is kept for all tokens, level `l` for the current block alone, so that the live key
    numbers of an unpadded row are `Hierarchy.key_numbers(T)` (arXiv 2509.07963, section 4, where only the count is
    given). A sliding window keeps its window.

    `append` what the new tokens bring, attend, then `forget` what no later query reads. While `recording`, `forget`
    waits for the next `crop`, so that tokens can be taken back across the edge of a block or window.

    Args:
        layout: what to keep.

    Attributes:
        length: tokens read, `T`.
        recording: whether to keep the past until the next `crop`.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.recording = False
        self.keys = tuple(Timeline(-1 if layout.dimension_major else -2) for _ in layout.keys)
        self.value = Timeline(-2)
        self._row_starts: list[int] = [0]

    @property
    def length(self) -> int:
        """Tokens read, `T`."""
        return self.value.end

    @property
    def rows(self) -> int | None:
        """Rows `B`; None while the cache is empty."""
        return self.value.storage.shape[0] if self.length else None

    @property
    def key_numbers(self) -> int:
        """Live key numbers of one row, all heads."""
        parts = zip(self.layout.keys, self.keys, strict=True)
        return sum(part.heads * part.width * (keys.end - keys.first) for part, keys in parts)

    @property
    def key_bytes(self) -> int:
        """Bytes of all rows' keys, room for growth included."""
        return sum(keys.nbytes for keys in self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key_bytes + self.value.nbytes

    def append(self, keys: Sequence[Tensor], value: Tensor) -> None:
        """Add what the next tokens bring; under autocast in the type that attention would cast it to.

        Args:
            keys: for each part of the layout `(B, heads, T', width)`.
            value: `(B, Hkv, T', dv)`.

        Raises:
            ValueError: tensors that require gradients, or whose rows, heads or widths are not those of the cache.
        """
        self._check(keys, value)
        for timeline, entries in zip(self.keys, map(in_autocast_dtype, keys), strict=True):
            timeline.append(entries.transpose(-2, -1) if self.layout.dimension_major else entries)
        self.value.append(in_autocast_dtype(value))

    def forget(self, key_start: Tensor | None = None) -> None:
        """Drop what no query after the last token reads.

        Args:
            key_start: `(B,)` integers, the first real token of each row, from which positions count.
        """
        self._row_starts = [0] if key_start is None else key_start.tolist()
        if not self.recording:
            self._drop()

    def crop(self, length: int) -> None:
        """Take back all tokens but the first `length`.

        Raises:
            ValueError: keys or values that the next query reads were dropped.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and the {self.length} tokens in the cache, got {length}")
        if length < self.length:
            for timeline, needed in self._needs(length):
                if timeline.first > needed:
                    raise ValueError(
                        f"cannot crop {self.length} tokens to {length}: the next query reads back to token {needed}, "
                        f"and what came before token {timeline.first} is dropped; set `recording` before appending "
                        "tokens that may be taken back"
                    )
        for timeline in (*self.keys, self.value):
            timeline.crop(length)
        if length:
            self._drop()
        else:
            self.reset()

    def take_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices, some perhaps several times (beams), some not at all."""
        if self.rows is not None and len(self._row_starts) == self.rows:
            self._row_starts = [self._row_starts[row] for row in rows.tolist()]
        for timeline in (*self.keys, self.value):
            timeline.take_rows(rows)

    def reset(self) -> None:
        """Forget every token."""
        for timeline in (*self.keys, self.value):
            timeline.reset()
        self._row_starts = [0]

    def _drop(self) -> None:
        # The block of the last token stays even where it is full: its keys are read again after a crop by one.
        for timeline, needed in self._needs(max(self.length - 1, 0)):
            timeline.drop_before(needed)

    def _needs(self, index: int) -> list[tuple[Timeline, int]]:
        """For each timeline the oldest entry that a query at `index` reads."""
        parts = [*self.layout.keys, self.layout.value]
        oldest = [min(part.reach.first_needed(index, start) for start in self._row_starts) for part in parts]
        return list(zip((*self.keys, self.value), oldest, strict=True))

    def _check(self, keys: Sequence[Tensor], value: Tensor) -> None:
        tensors, parts = [*keys, value], [*self.layout.keys, self.layout.value]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ValueError("a cache carries no gradients: generate under torch.no_grad(), train without a cache")
        if len(tensors) != len(parts):
            raise ValueError(f"keys must come in {len(self.layout.keys)} parts ({self.layout}), got {len(keys)}")
        rows = value.shape[0] if self.rows is None else self.rows
        for tensor, part in zip(tensors, parts, strict=True):
            expected = (rows, part.heads, value.shape[2], part.width)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"the cache holds {rows} rows of {self.layout}, so that new keys or values must be {expected}; "
                    f"got {tuple(tensor.shape)}"
                )
