"""Hold the valid keys of rows and the place of queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeySpan:
    """The padding of a batch, and the offset of its queries.

    Args:
        key_start: `(B,)` integers, the first valid key of each row; positions count from it. None means 0.
        key_end: `(B,)` integers, one past the last valid key of each row. None means all keys.
        query_offset: index of the first query among the keys.
    """

    key_start: Tensor | None = None
    key_end: Tensor | None = None
    query_offset: int = 0

    @property
    def is_padded(self) -> bool:
        """True if rows may have keys that are padding."""
        return self.key_start is not None or self.key_end is not None

    def from_key(self, first: int) -> KeySpan:
        """Return the span among the keys from index `first`."""
        start, end = (
            None if bound is None else (bound - first).clamp(min=0) for bound in (self.key_start, self.key_end)
        )
        return KeySpan(start, end, self.query_offset - first)


UNPADDED = KeySpan()
"""All keys are valid, and the first query is the first key."""
