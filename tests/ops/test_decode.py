"""Decode against the op it repeats: the last queries of a causal row, from a cache that keeps live keys alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn import Hierarchy
from structattn.ops import cpu, mlr_decode
from tests.ops.battery import definition
from tests.tolerance import assert_calibrated


def live_starts(hierarchy, key_length, queries, key_start):
    """For each level, the first index that any row's first query shares a block with."""
    rows = [0] if key_start is None else key_start.tolist()
    starts = []
    for size in hierarchy.block_sizes:
        positions = [max(key_length - queries - start, 0) for start in rows]
        edges = [p // size * size if size else 0 for p in positions]
        starts.append(min(start + edge for start, edge in zip(rows, edges, strict=True)))
    return starts


def cache(key, value, hierarchy, starts):
    """Keys level by level, dimension-major, from each level's start; capacity beyond the keys holds NaN."""
    levels = []
    for part, start in zip(key.split(hierarchy.ranks, -1), starts, strict=True):
        buffer = torch.full((*part.shape[:2], part.shape[3], part.shape[2] - start + 5), torch.nan, dtype=key.dtype)
        buffer[..., :-5] = part[:, :, start:].transpose(2, 3)
        levels.append(buffer)
    spare = torch.full((*value.shape[:2], 3, value.shape[3]), torch.nan, dtype=value.dtype)
    return levels, torch.cat([value, spare], 2)


def check(backend, hierarchy, queries, key_length, key_start=None, heads=(2, 2), dtype=torch.float32, width=5):
    if backend == "cpu" and cpu.ineligible() is not None:
        pytest.skip(str(cpu.ineligible()))
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], hierarchy.rank), (heads[1], hierarchy.rank), (heads[1], width)]
    query, key, value = (
        torch.randn(2, count, key_length, wide, generator=generator).to(dtype) for count, wide in shapes
    )
    start = None if key_start is None else torch.tensor(key_start)
    both = definition(query, key, value, hierarchy, is_causal=True, key_start=start, enable_gqa=True)
    exact, plain = (out[:, :, -queries:] for out in both)
    starts = live_starts(hierarchy, key_length, queries, start)
    levels, values = cache(key, value, hierarchy, starts)
    actual = mlr_decode(
        query[:, :, -queries:],
        levels,
        values,
        hierarchy,
        key_length=key_length,
        level_starts=starts,
        key_start=start,
        enable_gqa=heads[0] != heads[1],
        backend=backend,
    )
    assert_calibrated(actual, exact, plain, largest_term=float(value.abs().max()))


BACKENDS = ["cpu", "dense"]
DEEP = Hierarchy((5, 4, 2, 2), (None, 32, 16, 4), "mean")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_length", [1, 70, 1500])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_lengths_dtypes_and_groups(backend, dtype, key_length, heads):
    check(backend, DEEP, 1, key_length, heads=heads, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_cases(backend):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        sizes=st.lists(st.sampled_from([2, 3, 5, 40]), max_size=3),
        ranks=st.lists(st.integers(1, 11), min_size=4, max_size=4),
        gains=st.sampled_from([None, "mean", (1.0, -0.5, 0.0, 2.0)]),
        key_length=st.integers(1, 700),
        data=st.data(),
    )
    def run(sizes, ranks, gains, key_length, data):
        blocks = [2]
        for size in sizes:
            blocks.append(blocks[-1] * size)
        blocks = (None, *reversed(blocks[: len(sizes)]))
        hierarchy = Hierarchy(ranks[: len(blocks)], blocks, gains[: len(blocks)] if isinstance(gains, tuple) else gains)
        queries = data.draw(st.integers(1, min(key_length, 6)))
        key_start = data.draw(st.none() | st.tuples(st.just(0), st.integers(0, key_length)))
        check(backend, hierarchy, queries, key_length, key_start)

    run()


def test_kernel_reads_a_cache_in_another_layout():
    if cpu.ineligible() is not None:
        pytest.skip(str(cpu.ineligible()))
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 50, 2, 6).transpose(1, 2)
    actual = mlr_decode(query, [key.transpose(2, 3)], value, Hierarchy.flat(8), key_length=50, backend="cpu")
    assert_calibrated(actual, *definition(query, key, value, Hierarchy.flat(8)))


def good():
    hierarchy = Hierarchy((4, 2), (None, 8))
    keys = [torch.randn(1, 2, width, 12) for width in hierarchy.ranks]
    return {
        "query": torch.randn(1, 2, 1, 6),
        "key_levels": keys,
        "value": torch.randn(1, 2, 12, 3),
        "hierarchy": hierarchy,
        "key_length": 11,
        "level_starts": [0, 0],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hierarchy": Hierarchy.flat(5)}, "hierarchy's ranks"),
        ({"key_length": 13}, "key_length"),
        ({"key_length": 0}, "key_length"),
        ({"value": torch.randn(1, 1, 12, 3)}, "value"),
        ({"key_levels": [torch.randn(1, 2, 4, 12)]}, "one entry per level"),
        ({"key_levels": [torch.randn(1, 2, 4, 10), torch.randn(1, 2, 2, 12)]}, r"key_levels\[0\]"),
        ({"level_starts": [1, 0]}, r"level_starts\[0\]"),
        ({"level_starts": [0, 9]}, r"level_starts\[1\]"),
        ({"key_start": torch.tensor([20])}, "key_start"),
        ({"key_start": torch.tensor([1, 1])}, "key_start"),
        ({"key_start": torch.zeros(1, dtype=torch.int64, device="meta")}, "key_start must be on the query's device"),
        ({"query": torch.randn(2, 1, 6)}, "query must have four axes"),
        ({"value": torch.randn(12)}, "value must have four axes"),
        ({"value": torch.randn(1, 0, 12, 3)}, "value must be"),
        ({"key_levels": [torch.randn(2, 4, 12), torch.randn(1, 2, 2, 12)]}, r"key_levels\[0\] must have four axes"),
        ({"backend": "cpuu"}, "backend"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        mlr_decode(**(good() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hierarchy": "4|2"}, "hierarchy must be a structattn.Hierarchy, got str"),
        ({"query": [1.0]}, "query must be a tensor, got list"),
        ({"query": torch.ones(1, 2, 1, 6, dtype=torch.int64)}, "query must be float16, .* got torch.int64"),
        ({"key_start": [0]}, "key_start must be an int32 or int64 tensor, got list"),
    ],
)
def test_wrong_types_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        mlr_decode(**(good() | change))


def test_dtypes_must_agree():
    with pytest.raises(TypeError, match="value"):
        mlr_decode(**(good() | {"value": torch.randn(1, 2, 12, 3).double()}))


def test_operator_compiles_as_one_graph():
    call = good()
    torch._dynamo.reset()
    compiled = torch.compile(lambda query: mlr_decode(**(call | {"query": query})), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call["query"]), mlr_decode(**call))
