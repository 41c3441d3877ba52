"""Store the entries of key-value caches: append new ones, drop the oldest."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM = 64
"""Step of storage, in positions.

Storage grows by it, or by 1/QUANTUM of the entries where that is more. Storage is compacted when this many positions
have been dropped. A decoding step reads every live number, so copying them once in `QUANTUM` steps adds about
1/QUANTUM to its cost, more where new pages of memory must be mapped. Storage exceeds the live entries by less than
twice the growth."""

ALIGNMENT = 16
"""Modulus of positions: that of entry `i` differs from `i` by a multiple of it.

Storage has a multiple of `QUANTUM` positions. So an index that is a multiple of 16 lies at an aligned address, and
kernels can load vectors."""


class GrowingBuffer:
    """Consecutive entries of a sequence, along one tensor axis.

    The entries are `first … end - 1`. Axis 0 is the batch. The oldest entries are dropped in place: the views begin
    later in the same storage. Once `QUANTUM` positions have been dropped, the others are copied to new storage, so that
    the old storage is freed.

    Args:
        axis: the axis of time, negative.

    Attributes:
        first: index of the oldest entry.
        end: index after the newest.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.first = 0
        self.end = 0
        self._storage: Tensor | None = None
        self._dropped = 0  # positions of the storage before the oldest entry

    @property
    def storage(self) -> Tensor:
        """View of the entries, oldest first, and the unused room."""
        whole = self._whole
        return whole.narrow(self.axis, self._dropped, whole.shape[self.axis] - self._dropped)

    @property
    def live(self) -> Tensor:
        """View of the entries."""
        return self._whole.narrow(self.axis, self._dropped, self.end - self.first)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, its unused room included."""
        return 0 if self._storage is None else self._storage.untyped_storage().nbytes()

    @property
    def _whole(self) -> Tensor:
        if self._storage is None:
            raise ValueError("the cache is empty: append to it first")
        return self._storage

    def append(self, entries: Tensor) -> None:
        """Copy new entries to the end."""
        count, live = entries.shape[self.axis], self.end - self.first
        if self._storage is None:
            self._storage, self._dropped = _allocate(entries, self.axis, count), 0
        elif self._dropped + live + count > self._storage.shape[self.axis]:
            self._move(self.live, live + count)
        self._storage.narrow(self.axis, self._dropped + live, count).copy_(entries)
        self.end += count

    def put_behind(self, entries: Tensor) -> Tensor:
        """Copy entries to the unused room behind the newest; return `storage`. The next `append` overwrites them."""
        count, live = entries.shape[self.axis], self.end - self.first
        if self._dropped + live + count > self._whole.shape[self.axis]:
            self._move(self.live, live + count)
        self._whole.narrow(self.axis, self._dropped + live, count).copy_(entries)
        return self.storage

    def drop_before(self, index: int) -> None:
        """Drop the entries before an index, unless they are dropped already."""
        if index > self.first:
            index = min(index, self.end)
            self._dropped += index - self.first
            self.first = index
            if self._dropped >= QUANTUM:
                # Room for one more: the next entry would else move them all again.
                self._move(self.live, self.end - self.first + 1)

    def crop(self, end: int) -> None:
        """Drop the entries from index `end` on."""
        if end < self.end:
            self.first, self.end = min(self.first, end), end
            self._move(self.live, self.end - self.first)

    def take_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices."""
        if self._storage is not None:
            self._storage = self._storage.index_select(0, rows.to(self._storage.device))

    def reset(self) -> None:
        """Drop all entries."""
        self.first = self.end = self._dropped = 0
        self._storage = None

    def _move(self, entries: Tensor, positions: int) -> None:
        """Copy entries to new storage, the first to an aligned position."""
        lead = self.first % ALIGNMENT
        moved = _allocate(entries, self.axis, lead + positions)
        moved.narrow(self.axis, lead, entries.shape[self.axis]).copy_(entries)
        self._storage, self._dropped = moved, lead


def _allocate(like: Tensor, axis: int, positions: int) -> Tensor:
    """Return zeros for `positions` or more: kernels may read unused ones."""
    shape = list(like.shape)
    growth = max(positions // QUANTUM**2, 1) * QUANTUM
    shape[axis] = -(-positions // growth) * growth
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
