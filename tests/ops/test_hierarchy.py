"""The hierarchy: its arithmetic against counting pairs one by one, its text form, its checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn import Hierarchy, flops


@st.composite
def hierarchies(draw):
    sizes = []
    for _ in range(draw(st.integers(0, 4))):
        sizes.append((sizes[-1] if sizes else 1) * draw(st.integers(2, 4)))
    ranks = draw(st.lists(st.integers(1, 40), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    numbers = st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks))
    return Hierarchy(ranks, (None, *reversed(sizes)), draw(st.none() | st.just("mean") | numbers))


def _common(hierarchy, i, j):
    """Depth by its definition."""
    return max(m + 1 for m, size in enumerate(hierarchy.block_sizes) if size is None or i // size == j // size)


@settings(deadline=None, max_examples=50)
@given(hierarchies(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_counts_pairs(hierarchy, queries, keys, offset, is_causal):
    pairs = [(i, j) for i in range(offset, offset + queries) for j in range(keys) if j <= i or not is_causal]
    expected = [sum(_common(hierarchy, i, j) >= level for i, j in pairs) for level in range(1, hierarchy.levels + 1)]
    assert hierarchy.pair_counts(queries, keys, is_causal=is_causal, query_offset=offset) == expected


@settings(deadline=None, max_examples=50)
@given(hierarchies(), st.integers(1, 60))
def test_depth_and_score_flops(hierarchy, length):
    at = torch.arange(length)
    depth = hierarchy.depth(at[:, None], at)
    expected = [[_common(hierarchy, i, j) for j in range(length)] for i in range(length)]
    assert depth.tolist() == expected
    assert hierarchy.depth(length - 1, 0) == expected[-1][0]
    widths = torch.tensor(hierarchy.prefix_ranks)[depth - 1]
    assert flops.attention(hierarchy, 0, length).scores == 2 * int(widths.sum())
    assert flops.attention(hierarchy, 0, length, is_causal=True).scores == 2 * int(widths.tril().sum())


@settings(deadline=None, max_examples=50)
@given(hierarchies(), st.integers(0, 200))
def test_key_numbers(hierarchy, length):
    """Live numbers: those that the newest query, and so any that shares its blocks, can still read."""
    newest = length - 1
    live = sum(hierarchy.prefix_ranks[_common(hierarchy, newest, j) - 1] for j in range(length))
    assert hierarchy.key_numbers(length) == live


def test_costs_of_the_paper():
    """`32|8|6|4|4|4|4|2` over 1024 tokens costs 38.4 of 64 per pair, eight equal ranks 15.9 of 64."""
    for ranks, share in (((32, 8, 6, 4, 4, 4, 4, 2), 38.453125), ((8,) * 8, 15.9375)):
        hierarchy = Hierarchy.dyadic(ranks, 1024)
        assert flops.attention(hierarchy, 0, 1024).scores / (2 * 1024**2) == share
    assert 64 * 65_536 / Hierarchy.dyadic((8,) * 8, 1024).key_numbers(65_536) > 7


@settings(deadline=None)
@given(hierarchies())
def test_text_form_reads_back(hierarchy):
    assert Hierarchy.parse(str(hierarchy)) == hierarchy
    assert Hierarchy.parse(str(hierarchy).replace("|", ",")) == hierarchy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32|8|6|4|4|4|4|2@1024", Hierarchy.dyadic((32, 8, 6, 4, 4, 4, 4, 2), 1024)),
        ("8x8@1024/mean", Hierarchy.dyadic((8,) * 8, 1024, "mean")),
        ("3,2,1@*,96,48/1,0.5,0.25", Hierarchy((3, 2, 1), (None, 96, 48), (1, 0.5, 0.25))),
        ("64", Hierarchy.flat(64)),
        ("64@512", Hierarchy.flat(64)),
        ("2|1@*|5", Hierarchy((2, 1), (None, 5))),
    ],
)
def test_text_forms(text, expected):
    assert Hierarchy.parse(text) == expected


def test_dyadic_rounds_the_smallest_block_up():
    assert Hierarchy.dyadic((1, 1, 1), 1000).block_sizes == (None, 500, 250)
    assert Hierarchy.dyadic((1, 1, 1), 1001).block_sizes == (None, 502, 251)
    assert Hierarchy.dyadic((1, 1, 1), 1).block_sizes == (None, 2, 1)


def test_is_a_value():
    first, second = Hierarchy.dyadic([2, 1], 8, "mean"), Hierarchy((2, 1), [None, 4], [1, 0.5])
    assert first == second
    assert hash(first) == hash(second)
    assert repr(first) == "Hierarchy(ranks=(2, 1), block_sizes=(None, 4), gains=(1.0, 0.5))"
    with pytest.raises(AttributeError):
        first.ranks = (3,)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    hierarchy = Hierarchy((3, 2, 1), (None, 8, 4))
    image = hierarchy.plot(16).images[0].get_array()
    assert image.shape == (16, 16)
    assert image[0, 0] == 6
    assert image[0, 4] == 5
    assert image[0, 8] == 3
    pyplot.close("all")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), ()), ValueError, "ranks must name at least one level"),
        (((4, 0), (None, 2)), ValueError, r"ranks\[1\] must be a positive integer, got 0"),
        (((4, -1), (None, 2)), ValueError, r"ranks\[1\] must be a positive integer, got -1"),
        (((4, 1.5), (None, 2)), TypeError, r"ranks\[1\] must be a positive integer, got 1.5 \(float\)"),
        (((4, True), (None, 2)), TypeError, r"ranks\[1\] must be a positive integer, got True"),
        ((8, (None,)), TypeError, r"ranks must be a sequence, got 8 \(int\)"),
        (("8", (None,)), TypeError, r"ranks must be a sequence, got '8' \(str\)"),
        (((4, 4), (None,)), ValueError, r"block_sizes must have one entry per level \(2\), got 1"),
        (((4, 4), (16, 8)), ValueError, r"block_sizes\[0\] must be None, the global level, got 16"),
        (
            ((4, 4, 4), (None, 12, 8)),
            ValueError,
            r"block_sizes\[2\] = 8 must be a proper divisor of block_sizes\[1\] = 12",
        ),
        (((4, 4, 4), (None, 8, 16)), ValueError, "block_sizes must shrink and nest"),
        (((4, 4, 4), (None, 8, 8)), ValueError, "block_sizes must shrink and nest"),
        (((4, 4, 4), (None, 8, None)), TypeError, r"block_sizes\[2\] must be a positive integer, got None"),
        (((4, 4), (None, 0)), ValueError, r"block_sizes\[1\] must be a positive integer, got 0"),
        (((4, 4), (None, 8), (1.0,)), ValueError, r"gains must have one entry per level \(2\), got 1"),
        (((4, 4), (None, 8), (1.0, float("inf"))), ValueError, r"gains\[1\] must be finite, got inf"),
        (((4, 4), (None, 8), (1.0, "x")), TypeError, r"gains\[1\] must be a number, got 'x'"),
        (((4, 4), (None, 8), "median"), ValueError, "gains must be 'mean', None or 2 numbers, got 'median'"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        Hierarchy(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a positive integer, got '' in ''"),
        ("8|8", "has 2 levels and needs blocks"),
        ("8|a@16", r"got 'a' in '8\|a'"),
        ("8x@16", "got '' in '8x'"),
        ("8|8@16/median", "expected a number, got 'median'"),
        ("8|8@*|0", r"block_sizes\[1\] must be a positive integer"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy.parse(text)
    with pytest.raises(TypeError, match="must be a string"):
        Hierarchy.parse(8)


def test_bad_lengths():
    with pytest.raises(ValueError, match="context_length must be a positive integer, got 0"):
        Hierarchy.dyadic((8, 8), 0)
    with pytest.raises(ValueError, match="length must be a positive integer, got -1"):
        Hierarchy.flat(8).key_numbers(-1)
