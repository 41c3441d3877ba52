"""Decode against the op it repeats, by the battery of decode; what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn import Hierarchy
from structattn.ops import cpu, mlr_decode
from tests.ops import decode_battery
from tests.ops.battery import definition
from tests.ops.decode_battery import DecodeCase
from tests.ops.drawn import drawn_hierarchies
from tests.tolerance import assert_calibrated


def check(backend, hierarchy, queries, key_length, key_start=None, heads=(2, 2), dtype=torch.float32):
    if backend == "cpu" and cpu.ineligible() is not None:
        pytest.skip(str(cpu.ineligible()))
    decode_battery.check(DecodeCase(hierarchy, queries, key_length, key_start, *heads, dtype=dtype), backend)


BACKENDS = ["cpu", "dense"]
DEEP = Hierarchy((5, 4, 2, 2), (None, 32, 16, 4), "mean")
NEAR = Hierarchy((5, 4, 2, 2), None, "mean", windows=(None, 300, 60, 7), value_ranks=(17, 0, 3, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_length", [1, 70, 1500])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("hierarchy", [DEEP, NEAR], ids=["blocks", "windows"])
def test_lengths_dtypes_and_groups(backend, dtype, key_length, heads, hierarchy):
    check(backend, hierarchy, 1, key_length, heads=heads, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_cases(backend):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        drawn=drawn_hierarchies(),
        key_length=st.integers(1, 700),
        data=st.data(),
    )
    def run(drawn, key_length, data):
        hierarchy, _ = drawn
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
        ({"value": [torch.randn(1, 2, 12, 3)]}, r"value must have one entry per level \(2\), got 1"),
        ({"value": [torch.randn(1, 2, 12, 3), torch.randn(1, 2, 12, 1)]}, r"value\[1\] must be .* 0\)"),
        ({"value": [torch.randn(1, 2, 9, 3), torch.randn(1, 2, 12, 0)]}, r"value\[0\] must be .* at least"),
        ({"hierarchy": Hierarchy((4, 2), (None, 8), value_ranks=(2, 1))}, "value must be one tensor for each of 2"),
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


def test_sinks_are_refused():
    """Buffers of levels do not hold them."""
    case = DecodeCase(Hierarchy((64,), windows=(20,), sinks=4))
    for backend in ("auto", "dense"):
        with pytest.raises(ValueError, match=r"hierarchy must have no sinks, got 64@w20\+4: mlr_decode reads levels"):
            decode_battery.result(case, backend)
