"""Store the entries of key-value caches: append new ones, drop the oldest."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM = 64
"""Positions by which storage grows. A decoding step reads every live number, so copying them once in `QUANTUM` steps
adds 1/QUANTUM to its cost. Storage exceeds the live entries by less than `QUANTUM` positions."""


class GrowingBuffer:
    """Entries `first … end - 1` of a sequence, along one tensor axis.

    Axis 0 is the batch. Dropping entries copies the remaining ones to new storage, so that the old storage is freed.

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

    @property
    def storage(self) -> Tensor:
        """Entries, oldest first, with unused room after the newest."""
        if self._storage is None:
            raise ValueError("the cache is empty: append to it first")
        return self._storage

    @property
    def live(self) -> Tensor:
        """A view of the entries."""
        return self.storage.narrow(self.axis, 0, self.end - self.first)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, its unused room included."""
        return 0 if self._storage is None else self._storage.untyped_storage().nbytes()

    def append(self, entries: Tensor) -> None:
        """Copy new entries to the end."""
        count, live = entries.shape[self.axis], self.end - self.first
        if self._storage is None:
            self._storage = _allocate(entries, self.axis, count)
        elif live + count > self._storage.shape[self.axis]:
            grown = _allocate(entries, self.axis, live + count)
            grown.narrow(self.axis, 0, live).copy_(self.live)
            self._storage = grown
        self._storage.narrow(self.axis, live, count).copy_(entries)
        self.end += count

    def drop_before(self, index: int) -> None:
        """Drop the entries before an index. Do nothing where they are dropped already."""
        if index > self.first:
            index = min(index, self.end)
            self._keep(self.live.narrow(self.axis, index - self.first, self.end - index))
            self.first = index

    def crop(self, end: int) -> None:
        """Drop the entries from index `end` on, which is at least `first`."""
        if end < self.end:
            self.end = end
            self._keep(self.live)

    def take_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices."""
        if self._storage is not None:
            self._storage = self._storage.index_select(0, rows.to(self._storage.device))

    def reset(self) -> None:
        """Drop all entries."""
        self.first = self.end = 0
        self._storage = None

    def _keep(self, entries: Tensor) -> None:
        kept = _allocate(entries, self.axis, entries.shape[self.axis])
        kept.narrow(self.axis, 0, entries.shape[self.axis]).copy_(entries)
        self._storage = kept


def _allocate(like: Tensor, axis: int, positions: int) -> Tensor:
    """Return zeros for so many positions, rounded up.

    Kernels may read the unused room, so it must be finite.
    """
    shape = list(like.shape)
    shape[axis] = -(-positions // QUANTUM) * QUANTUM
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
