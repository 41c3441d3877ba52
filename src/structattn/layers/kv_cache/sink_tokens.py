"""Store the keys and values of each row's first tokens, which a cache never forgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer


class SinkTokens:
    """Keys and values of the first real tokens of each row, all slices side by side.

    Args:
        count: tokens of a row, `s`.

    Attributes:
        keys: `(B, Hkv, s, r)`; zeros where a row has not begun. None before the first token.
        values: `(B, Hkv, s, dv)`, likewise.
        end: index after the newest token that was looked at.
        is_complete: True once all rows are known to have all of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.end = 0
        self.is_complete = False

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys."""
        return 0 if self.keys is None else self.keys.untyped_storage().nbytes()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key_bytes + (0 if self.values is None else self.values.untyped_storage().nbytes())

    def capture(self, keys: Sequence[GrowingBuffer], values: Sequence[GrowingBuffer], key_start: Tensor | None) -> None:
        """Copy the sinks among the tokens since the last call. No number is read from the device.

        Args:
            keys: a buffer for each slice of the keys. They still hold all new tokens.
            values: the same for the values.
            key_start: `(B,)` integers, the first real token of each row.
        """
        end = values[0].end
        if self.is_complete or end == self.end:
            return
        newest = values[0].live
        index = torch.arange(self.count, device=newest.device).expand(newest.shape[0], -1)
        index = index if key_start is None else index + key_start[:, None]
        is_new = ((index >= self.end) & (index < end))[:, None, :, None]
        self.keys, self.values = (
            torch.where(is_new, found, 0.0 if kept is None else kept)
            for found, kept in ((_gather(keys, index), self.keys), (_gather(values, index), self.values))
        )
        self.end = end

    def complete(self, row_starts: Sequence[int]) -> None:
        """Stop looking for sinks once rows that start at these indices have all of them."""
        self.is_complete = max(row_starts) + self.count <= self.end

    def crop(self, end: int) -> None:
        """Look again for sinks from index `end` on, which becomes the next index."""
        if end < self.end:
            self.end, self.is_complete = end, False

    def take_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def reset(self) -> None:
        """Drop all tokens."""
        self.keys = self.values = None
        self.end, self.is_complete = 0, False


def _gather(buffers: Sequence[GrowingBuffer], index: Tensor) -> Tensor:
    """Return entries `(B, heads, s, width)` at indices `(B, s)`, slices side by side; any entry where out of range."""
    parts = []
    for buffer in buffers:
        entries = buffer.live if buffer.axis == -2 else buffer.live.mT
        at = (index - buffer.first).clamp(0, entries.shape[2] - 1)[:, None, :, None]
        parts.append(torch.take_along_dim(entries, at, 2))
    return torch.cat(parts, -1)
