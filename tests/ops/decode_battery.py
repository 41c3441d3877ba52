"""Decode against the op it repeats: the last queries of a causal row, from a cache that keeps live keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.ops import Hierarchy, mlr_decode
from tests.ops.battery import definition
from tests.tolerance import Deviation, deviation


@dataclass(frozen=True)
class DecodeCase:
    """A call of `mlr_decode` for two rows, tensors drawn from a seed."""

    hierarchy: Hierarchy
    queries: int = 1
    key_length: int = 300
    key_start: tuple[int, ...] | None = None
    heads: int = 2
    key_heads: int = 2
    width: int = 5  # of values, where the hierarchy does not say
    aligned: bool = False  # buffers hold a multiple of 64 tokens, as a cache that grows in steps does
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # where the backend runs; the definition runs on the CPU

    @property
    def value_width(self) -> int:
        """Dimensions of values, of all levels."""
        return sum(self.hierarchy.value_ranks or ()) or self.width

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of all tokens."""
        generator = torch.Generator().manual_seed(seed)
        widths = (self.hierarchy.rank, self.hierarchy.rank, self.value_width)
        counts = (self.heads, self.key_heads, self.key_heads)
        query, key, value = (
            torch.randn(2, count, self.key_length, wide, generator=generator).to(self.dtype)
            for count, wide in zip(counts, widths, strict=True)
        )
        return query, key, value


def result(case: DecodeCase, backend: str) -> Tensor:
    """The output; capacity beyond the tokens holds NaN."""
    query, key, value = case.tensors()
    start = None if case.key_start is None else torch.tensor(case.key_start)
    starts = live_starts(case.hierarchy, case.key_length, case.queries, start)
    keys, values = cache(key, value, case.hierarchy, starts, 64 if case.aligned else 1)
    return mlr_decode(
        query[:, :, -case.queries :].to(case.device),
        [each.to(case.device) for each in keys],
        values.to(case.device) if isinstance(values, Tensor) else [each.to(case.device) for each in values],
        case.hierarchy,
        key_length=case.key_length,
        level_starts=starts,
        key_start=None if start is None else start.to(case.device),
        enable_gqa=case.heads != case.key_heads,
        backend=backend,
    ).cpu()


def compare(case: DecodeCase, actual: Tensor) -> list[Deviation]:
    """Compare what `result` gave with the definition."""
    query, key, value = case.tensors()
    start = None if case.key_start is None else torch.tensor(case.key_start)
    last, offset = query[:, :, -case.queries :], case.key_length - case.queries
    options = {"is_causal": True, "query_offset": offset, "key_start": start, "enable_gqa": True}
    exact, plain = definition(last, key, value, case.hierarchy, **options)
    return [deviation(actual, exact, plain, "output", float(value.abs().max()))]


def check(case: DecodeCase, backend: str) -> None:
    """Assert that the output is as near to the definition as is allowed."""
    for each in compare(case, result(case, backend)):
        each.check()


def live_starts(hierarchy: Hierarchy, key_length: int, queries: int, key_start: Tensor | None) -> list[int]:
    """Return each level's first index within reach of any first query."""
    rows = [0] if key_start is None else key_start.tolist()
    starts = []
    for size in hierarchy.sizes:
        positions = [max(key_length - queries - start, 0) for start in rows]
        if hierarchy.by_window:
            edges = [max(p - size + 1, 0) if size else 0 for p in positions]
        else:
            edges = [p // size * size if size else 0 for p in positions]
        starts.append(min(start + edge for start, edge in zip(rows, edges, strict=True)))
    return starts


def cache(
    key: Tensor, value: Tensor, hierarchy: Hierarchy, starts: Sequence[int], multiple: int = 1
) -> tuple[list[Tensor], Tensor | list[Tensor]]:
    """Keys (dimension-major) and values from each level's start; capacity beyond the tokens holds NaN."""
    keys, values = [], []
    for part, start in zip(key.split(hierarchy.ranks, -1), starts, strict=True):
        keys.append(_with_spare(part[:, :, start:], 5, multiple).transpose(2, 3).contiguous())
    for part, start in zip(value.split(hierarchy.value_widths(value.shape[3]), -1), starts, strict=True):
        values.append(_with_spare(part[:, :, start:], 3, multiple))
    return keys, values if hierarchy.value_ranks is not None else values[0]


def _with_spare(tensor: Tensor, count: int, multiple: int) -> Tensor:
    count += -(tensor.shape[2] + count) % multiple
    return torch.cat([tensor, torch.full_like(tensor[:, :, :1], torch.nan).expand(-1, -1, count, -1)], 2)
