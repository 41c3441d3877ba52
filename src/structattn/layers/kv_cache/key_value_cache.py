"""Store the keys and values that one attention layer has read.

Shapes: B rows, Hkv key heads, T tokens read so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice
from structattn.layers.kv_cache.sink_tokens import SinkTokens


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast to the autocast dtype if autocast is on; keep float64."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class KeyValueCache:
    """Keys and values that one attention layer has read.

    It serves generation without gradients. For MLR attention it keeps each level as far back as the level reaches. An
    unpadded row then has `Hierarchy.cache_numbers(T, dv)` live numbers for each key head.

    Call `append` with the new tokens, attend, then `forget`, which drops what no later query reads. While `recording`
    is set, only `crop` drops entries: tokens can then be taken back across the edge of a block or window.

    Args:
        layout: the slices to keep.

    Attributes:
        recording: while it is set, only `crop` drops entries; `forget` does not. It stays set until you clear it.
        keys: a buffer for each slice of the keys.
        values: a buffer for each slice of the values.
        sinks: the first tokens of each row, which are never dropped; None where the layout keeps none.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.recording = False
        self.keys = tuple(GrowingBuffer(-1 if layout.dimension_major else -2) for _ in layout.keys)
        self.values = tuple(GrowingBuffer(-2) for _ in layout.values)
        self.sinks = SinkTokens(layout.sinks) if layout.sinks else None
        self._has_blocks = any(part.retention.block is not None for part in layout.slices)
        self._row_starts: tuple[int, ...] = (0,)  # of all rows, without repetition
        self._rows_have_begun = False

    @property
    def length(self) -> int:
        """Tokens read, `T`."""
        return self.values[0].end

    @property
    def rows(self) -> int | None:
        """Rows `B`; None while the cache is empty."""
        return self.values[0].storage.shape[0] if self.length else None

    @property
    def key_numbers(self) -> int:
        """Live key numbers of one row, all heads."""
        return _live_numbers(self.layout.keys, self.keys)

    @property
    def value_numbers(self) -> int:
        """Live value numbers of one row, all heads."""
        return _live_numbers(self.layout.values, self.values)

    @property
    def key_bytes(self) -> int:
        """Bytes of all rows' keys, room for growth included."""
        return sum(keys.nbytes for keys in self.keys) + (0 if self.sinks is None else self.sinks.key_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room for growth included."""
        return sum(buffer.nbytes for buffer in self._buffers) + (0 if self.sinks is None else self.sinks.nbytes)

    def append(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Append the keys and values of new tokens.

        Under autocast they are stored in its dtype.

        Args:
            keys: for each slice of the keys `(B, heads, T', width)`.
            values: the same for each slice of the values.

        Raises:
            ValueError: tensors that require gradients, or whose rows, heads or widths are not those of the cache.
        """
        self._check(keys, values)
        for buffer, entries in zip(self.keys, map(to_autocast_dtype, keys), strict=True):
            buffer.append(entries.transpose(-2, -1) if self.layout.dimension_major else entries)
        for buffer, entries in zip(self.values, map(to_autocast_dtype, values), strict=True):
            buffer.append(entries)

    def capture_sinks(self, key_start: Tensor | None = None) -> None:
        """Copy the sinks among the newest tokens, before attention reads them. `forget` does it as well.

        Args:
            key_start: `(B,)` integers, the first real token of each row.
        """
        if self.sinks is not None:
            self.sinks.capture(self.keys, self.values, key_start)

    def forget(self, key_start: Tensor | None = None) -> None:
        """Drop what no query after the last token reads.

        A full block stays until the next token, so that one token can be taken back. `key_start` is read from the
        device once per sequence, to avoid a sync at every token. It is read again only while some row is still all
        padding.

        Args:
            key_start: `(B,)` integers, the first real token of each row, from which positions count. It must not
                change for a row once that token is in the cache.
        """
        self.capture_sinks(key_start)
        if self._has_blocks or self.sinks is not None:
            self._read_row_starts(key_start)
        if self.sinks is not None:
            self.sinks.complete(self._row_starts)
        if not self.recording:
            self._drop()

    def _read_row_starts(self, key_start: Tensor | None) -> None:
        if key_start is None:
            self._row_starts, self._rows_have_begun = (0,), False
        elif not self._rows_have_begun:
            self._row_starts = tuple(sorted(set(key_start.tolist()))) or (0,)
            self._rows_have_begun = max(self._row_starts) < self.length

    def crop(self, length: int) -> None:
        """Take back all tokens but the first `length`.

        Raises:
            ValueError: keys or values that the next query reads were dropped.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and the {self.length} tokens in the cache, got {length}")
        if length == 0:
            self.reset()
            return
        if length < self.length:
            for buffer, needed in self._needs(length):
                if buffer.first > needed and needed < length:
                    raise ValueError(
                        f"cannot crop {self.length} tokens to {length}: the next query reads back to token {needed}, "
                        f"and what came before token {buffer.first} is dropped; set `recording` before appending "
                        "tokens that may be taken back"
                    )
        for buffer in self._buffers:
            buffer.crop(length)
        if self.sinks is not None:
            self.sinks.crop(length)
        if max(self._row_starts) >= length:
            self._rows_have_begun = False
        self._drop()

    def take_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices.

        An index may repeat (beams) or be left out. Dropped rows still count in what is kept, since finding them would
        need a device sync. The cache may keep more than it must.
        """
        for buffer in self._buffers:
            buffer.take_rows(rows)
        if self.sinks is not None:
            self.sinks.take_rows(rows)

    def reset(self) -> None:
        """Drop all tokens."""
        for buffer in self._buffers:
            buffer.reset()
        if self.sinks is not None:
            self.sinks.reset()
        self._row_starts, self._rows_have_begun = (0,), False

    @property
    def _buffers(self) -> tuple[GrowingBuffer, ...]:
        return (*self.keys, *self.values)

    def _drop(self) -> None:
        # A full block stays until the next token, so that one token can be taken back.
        for buffer, needed in self._needs(max(self.length - 1, 0)):
            buffer.drop_before(needed)

    def _needs(self, index: int) -> list[tuple[GrowingBuffer, int]]:
        """Return each buffer with the oldest index that a query reads."""
        needed = [
            min(part.retention.first_needed(index, start) for start in self._row_starts) for part in self.layout.slices
        ]
        return list(zip(self._buffers, needed, strict=True))

    def _check(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*keys, *values)):
            raise ValueError("a cache carries no gradients: generate under torch.no_grad(), train without a cache")
        if (len(keys), len(values)) != (len(self.keys), len(self.values)):
            raise ValueError(
                f"keys must come in {len(self.keys)} slices and values in {len(self.values)} ({self.layout}), got "
                f"{len(keys)} and {len(values)}"
            )
        rows = values[0].shape[0] if self.rows is None else self.rows
        for tensor, part in zip((*keys, *values), self.layout.slices, strict=True):
            expected = (rows, part.heads, values[0].shape[2], part.width)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"the cache holds {rows} rows of {self.layout}, so that new keys or values must be {expected}; "
                    f"got {tuple(tensor.shape)}"
                )


def _live_numbers(slices: Sequence[CacheSlice], buffers: Sequence[GrowingBuffer]) -> int:
    """Return the numbers of one row, all heads. Sinks that a buffer still holds count once."""
    tokens = [
        buffer.end - buffer.first + min(part.retention.sinks, buffer.first)
        for part, buffer in zip(slices, buffers, strict=True)
    ]
    return sum(part.heads * part.width * count for part, count in zip(slices, tokens, strict=True))
