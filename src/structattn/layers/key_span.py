"""The valid keys of each row of a batch, and where the queries stand among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor


class KeySpanArguments(TypedDict):
    """Keyword arguments that the attention ops share."""

    key_start: Tensor | None
    key_end: Tensor | None
    query_offset: int


@dataclass(frozen=True, eq=False)
class KeySpan:
    """The padding of a batch, and the offset of its queries.

    Args:
        key_start: `(B,)` integers, the first valid key of each row.
        key_end: `(B,)` integers, one past the last valid key of each row.
        query_offset: index of the first query among the keys.
    """

    key_start: Tensor | None = None
    key_end: Tensor | None = None
    query_offset: int = 0

    def arguments(self) -> KeySpanArguments:
        """Return the keyword arguments of an attention op."""
        return {"key_start": self.key_start, "key_end": self.key_end, "query_offset": self.query_offset}

    def from_key(self, first: int) -> KeySpan:
        """Return the span among the keys from index `first` on."""
        start, end = (
            None if bound is None else (bound - first).clamp(min=0) for bound in (self.key_start, self.key_end)
        )
        return KeySpan(start, end, self.query_offset - first)


UNPADDED = KeySpan()
"""All keys are valid, and the first query is the first key."""
