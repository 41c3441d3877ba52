"""The hierarchy: its arithmetic against counting pairs one by one, its text form, its checks."""

import copy
import itertools
import pickle

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn import Hierarchy, flops


@st.composite
def hierarchies(draw, *, with_values=None):
    levels = draw(st.integers(1, 5))
    reach = {}
    if draw(st.booleans()):
        finite = sorted(draw(st.sets(st.integers(1, 60), min_size=levels, max_size=levels)), reverse=True)
        reach["windows"] = (draw(st.sampled_from([None, finite[0]])), *finite[1:])
    else:
        sizes = []
        for _ in range(levels - 1):
            sizes.append((sizes[-1] if sizes else 1) * draw(st.integers(2, 4)))
        reach["block_sizes"] = (None, *reversed(sizes))
    ranks = draw(st.lists(st.integers(1, 40), min_size=levels, max_size=levels))
    numbers = st.lists(st.floats(-2, 2), min_size=levels, max_size=levels)
    gains = draw(st.none() | st.just("mean") | numbers)
    smallest = reach.get("windows", (None,))[-1]
    sinks = draw(st.integers(0, min(smallest - 1, 9))) if smallest is not None else 0
    value_ranks = None
    if draw(st.booleans()) if with_values is None else with_values:
        value_ranks = draw(st.lists(st.integers(0, 40), min_size=levels, max_size=levels).filter(any))
    return Hierarchy(ranks, gains=gains, value_ranks=value_ranks, sinks=sinks, **reach)


def _common(hierarchy, i, j):
    """Depth by its definition."""
    if hierarchy.windows is not None:
        return sum(window is None or abs(i - j) < window or j < hierarchy.sinks for window in hierarchy.windows)
    return max(m + 1 for m, size in enumerate(hierarchy.block_sizes) if size is None or i // size == j // size)


@settings(deadline=None, max_examples=80)
@given(hierarchies(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_counts_pairs(hierarchy, queries, keys, offset, is_causal):
    pairs = [(i, j) for i in range(offset, offset + queries) for j in range(keys) if j <= i or not is_causal]
    expected = [sum(_common(hierarchy, i, j) >= level for i, j in pairs) for level in range(1, hierarchy.levels + 1)]
    assert hierarchy.pair_counts(queries, keys, is_causal=is_causal, query_offset=offset) == expected


@settings(deadline=None, max_examples=80)
@given(hierarchies(with_values=True), st.integers(1, 60))
def test_depth_and_flops(hierarchy, length):
    at = torch.arange(length)
    depth = hierarchy.depth(at[:, None], at)
    expected = [[_common(hierarchy, i, j) for j in range(length)] for i in range(length)]
    assert depth.tolist() == expected
    assert hierarchy.depth(length - 1, 0) == expected[-1][0]
    scores = torch.tensor((0, *hierarchy.prefix_ranks))[depth]
    values = torch.tensor((0, *itertools.accumulate(hierarchy.value_ranks)))[depth]
    assert hierarchy.score_flops(length) == 2 * int(scores.sum())
    assert hierarchy.score_flops(length, is_causal=True) == 2 * int(scores.tril().sum())
    assert hierarchy.mixing_flops(length) == 2 * int(values.sum())
    assert hierarchy.mixing_flops(length, is_causal=True) == 2 * int(values.tril().sum())
    cost = flops.attention(hierarchy, sum(hierarchy.value_ranks), length, is_causal=True)
    assert (cost.scores, cost.forward) == (2 * int(scores.tril().sum()), 2 * int((scores + values).tril().sum()))


@settings(deadline=None, max_examples=80)
@given(hierarchies(), st.integers(0, 200))
def test_cache_numbers(hierarchy, length):
    """Live numbers: those that the newest query, and so any that shares its blocks or window, can still read."""
    depths = [_common(hierarchy, length - 1, j) for j in range(length)]
    keys, width = sum((0, *hierarchy.prefix_ranks)[depth] for depth in depths), sum(hierarchy.value_ranks or (7,))
    prefixes = (0, *itertools.accumulate(hierarchy.value_ranks or (7, *(0,) * (hierarchy.levels - 1))))
    values = sum(prefixes[depth] for depth in depths)
    assert hierarchy.key_numbers(length) == keys
    assert hierarchy.value_numbers(length, width) == values
    assert hierarchy.cache_numbers(length, width) == keys + values


def test_cache_of_windows_at_long_contexts():
    """Levels in keys and values keep 26% of the cache at 16,384 tokens, levels in keys alone 62%."""
    windows = Hierarchy((16, 16, 32), windows=(None, 512, 128), value_ranks=(16, 16, 32))
    assert round(windows.cache_numbers(16_384) / (16_384 * 128), 3) == 0.262
    keys = Hierarchy.dyadic((8,) * 8, 16_384)
    assert round(keys.cache_numbers(16_384, 64) / (16_384 * 128), 2) == 0.62


def test_values_need_their_width_once():
    with pytest.raises(ValueError, match="value_dim must be given: the hierarchy has no value_ranks"):
        Hierarchy.flat(8).value_numbers(5)
    with pytest.raises(ValueError, match=r"value_ranks must sum to the values' width 9, got 4\|4 = 8"):
        Hierarchy((4, 4), windows=(None, 3), value_ranks=(4, 4)).cache_numbers(5, 9)


def test_costs_of_the_paper():
    """`32|8|6|4|4|4|4|2` over 1024 tokens costs 38.4 of 64 per pair, eight equal ranks 15.9 of 64."""
    for ranks, share in (((32, 8, 6, 4, 4, 4, 4, 2), 38.453125), ((8,) * 8, 15.9375)):
        hierarchy = Hierarchy.dyadic(ranks, 1024)
        assert hierarchy.score_flops(1024) / (2 * 1024**2) == share
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
        ("16|16|32@w512|128", Hierarchy((16, 16, 32), windows=(None, 512, 128))),
        ("16,16,32@w*,512,128", Hierarchy((16, 16, 32), windows=(None, 512, 128))),
        ("8x2v@w64|16/mean", Hierarchy((8, 8), None, "mean", windows=(64, 16), value_ranks=(8, 8))),
        ("64v32@w128", Hierarchy((64,), windows=(128,), value_ranks=(32,))),
        ("8|8v12|0@64", Hierarchy((8, 8), (None, 32), value_ranks=(12, 0))),
        ("64v@w192+4", Hierarchy((64,), windows=(192,), value_ranks=(64,), sinks=4)),
        (
            "8,24,32v@w*,640,192+4/mean",
            Hierarchy((8, 24, 32), None, "mean", windows=(None, 640, 192), value_ranks=(8, 24, 32), sinks=4),
        ),
        ("8|8@w64+4", Hierarchy((8, 8), windows=(None, 64), sinks=4)),
        ("8@w9+0", Hierarchy((8,), windows=(9,))),
        ("8|8@w64/1|1e+20", Hierarchy((8, 8), None, (1.0, 1e20), windows=(None, 64))),
    ],
)
def test_text_forms(text, expected):
    assert Hierarchy.parse(text) == expected


def test_dyadic_rounds_the_smallest_block_up():
    assert Hierarchy.dyadic((1, 1, 1), 1000).block_sizes == (None, 500, 250)
    assert Hierarchy.dyadic((1, 1, 1), 1001).block_sizes == (None, 502, 251)
    assert Hierarchy.dyadic((1, 1, 1), 1).block_sizes == (None, 2, 1)


def test_one_level_that_sees_everything():
    flat = Hierarchy.flat(8)
    assert flat == Hierarchy((8,)) == Hierarchy((8,), (None,)) == Hierarchy((8,), windows=(None,))
    assert hash(flat) == hash(Hierarchy((8,), windows=(None,)))


@settings(deadline=None, max_examples=80)
@given(hierarchies(), st.integers(1, 70))
def test_within_a_window(hierarchy, window):
    """Near pairs keep their widths and gains, the others are invisible."""
    if hierarchy.levels > 1 and not hierarchy.by_window:
        with pytest.raises(ValueError, match="levels by block cannot lie within a window"):
            hierarchy.within(window)
        return
    if hierarchy.sinks >= window:
        with pytest.raises(ValueError, match="sinks must be below the smallest window"):
            hierarchy.within(window)
        return
    near = hierarchy.within(window)
    assert near.sizes[0] <= window
    sinks = hierarchy.sinks
    assert near.depth(500, sinks - 1) == (near.levels if sinks else 0)
    for distance in range(80):
        before, after = (each.depth(sinks + distance, sinks) for each in (hierarchy, near))
        if distance >= window or before == 0:
            assert after == 0
            continue
        assert near.gains[after - 1] == hierarchy.gains[before - 1]
        assert near.prefix_ranks[after - 1] == hierarchy.prefix_ranks[before - 1]
        dim = None if hierarchy.value_ranks else 7
        assert sum(near.value_widths(dim)[:after]) == sum(hierarchy.value_widths(dim)[:before])


def test_within_a_window_by_example():
    parse = Hierarchy.parse
    assert Hierarchy.flat(8).within(5) == Hierarchy((8,), windows=(5,))
    assert parse("16|16|32v8|0|24@w512|128/1|0.5|0.25").within(600) == parse("16|16|32v8|0|24@w600|512|128/1|0.5|0.25")
    assert parse("16|16|32v8|0|24@w512|128/1|0.5|0.25").within(512) == parse("32|32v8|24@w512|128/0.5|0.25")
    assert parse("16|16|32v8|0|24@w512|128").within(64) == parse("64v32@w64")
    sliding = Hierarchy((4, 4), windows=(9, 3))
    assert sliding.within(9) == sliding.within(12) == sliding
    with pytest.raises(ValueError, match="window must be a positive integer, got 0"):
        Hierarchy.flat(8).within(0)


def test_is_a_value():
    first, second = Hierarchy.dyadic([2, 1], 8, "mean"), Hierarchy((2, 1), [None, 4], [1, 0.5])
    assert first == second
    assert hash(first) == hash(second)
    assert repr(first) == "Hierarchy(ranks=(2, 1), block_sizes=(None, 4), gains=(1.0, 0.5))"
    sinks = Hierarchy((2, 1), windows=(None, 4), sinks=3)
    assert repr(sinks) == "Hierarchy(ranks=(2, 1), windows=(None, 4), gains=(1.0, 1.0), sinks=3)"
    assert eval(repr(sinks), {"Hierarchy": Hierarchy}) == sinks != sinks.without_sinks()
    assert sinks.without_sinks() == Hierarchy((2, 1), windows=(None, 4))
    near = Hierarchy((2, 1), windows=(None, 4), value_ranks=(3, 0))
    assert repr(near) == "Hierarchy(ranks=(2, 1), windows=(None, 4), value_ranks=(3, 0), gains=(1.0, 1.0))"
    assert eval(repr(near), {"Hierarchy": Hierarchy}) == near
    assert near != Hierarchy((2, 1), windows=(None, 4))
    with pytest.raises(AttributeError):
        first.ranks = (3,)


def test_a_pickle_from_before_sinks_reads_back():
    hierarchy = Hierarchy((2, 1), windows=(None, 4))
    old = Hierarchy.__new__(Hierarchy)
    old.__setstate__({name: value for name, value in vars(hierarchy).items() if name not in ("sinks", "text")})
    assert old == hierarchy
    assert (old.sinks, old.text) == (0, "2|1@w*|4")
    sinks = Hierarchy.parse("2|1@w*|4+3")
    assert pickle.loads(pickle.dumps(sinks)) == copy.deepcopy(sinks) == sinks


def test_a_plot_of_values_needs_value_ranks():
    with pytest.raises(ValueError, match=r"of='values' needs a hierarchy with value_ranks, got 4\|4@16"):
        Hierarchy.dyadic((4, 4), 16).plot(of="values")


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    hierarchy = Hierarchy((3, 2, 1), (None, 8, 4))
    image = hierarchy.plot(16).images[0].get_array()
    assert image.shape == (16, 16)
    assert image[0, 0] == 6
    assert image[0, 4] == 5
    assert image[0, 8] == 3
    near = Hierarchy((3, 2), windows=(9, 4), value_ranks=(5, 1))
    scores, values = (near.plot(12, of=of).images[0].get_array() for of in ("scores", "values"))
    assert (scores[11, 11], scores[11, 7], values[11, 8], values[11, 7]) == (5, 3, 6, 5)
    assert scores[11, 2] is numpy.ma.masked
    sinks = Hierarchy((3, 2), windows=(9, 4), sinks=2).plot(12).images[0].get_array()
    assert (sinks[11, 1], sinks[0, 1], sinks[11, 7]) == (5, 5, 3)
    assert sinks[11, 2] is numpy.ma.masked
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
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "2 levels need block_sizes or windows, got neither"),
        ({"block_sizes": (None, 4), "windows": (None, 4)}, ValueError, "give block_sizes or windows, not both"),
        ({"windows": (None,)}, ValueError, r"windows must have one entry per level \(2\), got 1"),
        ({"windows": (None, None)}, TypeError, r"windows\[1\] must be a positive integer, got None"),
        ({"windows": (None, 0)}, ValueError, r"windows\[1\] must be a positive integer, got 0"),
        ({"windows": (8, 8)}, ValueError, r"windows must shrink: windows\[1\] = 8 must be below windows\[0\] = 8"),
        ({"windows": (8, 16)}, ValueError, r"windows\[1\] = 16 must be below windows\[0\] = 8"),
        ({"windows": 8}, TypeError, r"windows must be a sequence, got 8 \(int\)"),
        (
            {"windows": (9, 3), "value_ranks": (4,)},
            ValueError,
            r"value_ranks must have one entry per level \(2\), got 1",
        ),
        (
            {"windows": (9, 3), "value_ranks": (4, -1)},
            ValueError,
            r"value_ranks\[1\] must be a positive integer, got -1",
        ),
        ({"windows": (9, 3), "value_ranks": (4, 0.5)}, TypeError, r"value_ranks\[1\] must be a positive integer"),
        ({"windows": (9, 3), "value_ranks": (0, 0)}, ValueError, "value_ranks must sum to the width of the values"),
        ({"windows": (9, 3), "sinks": 3}, ValueError, "sinks must be below the smallest window 3, got 3"),
        ({"windows": (9, 3), "sinks": -1}, ValueError, "sinks must be a positive integer, got -1"),
        ({"windows": (9, 3), "sinks": 1.5}, TypeError, "sinks must be a positive integer, got 1.5"),
        ({"block_sizes": (None, 4), "sinks": 1}, ValueError, "sinks need levels by window, .* got sinks = 1 without"),
    ],
)
def test_bad_reach_and_values(arguments, error, message):
    with pytest.raises(error, match=message):
        Hierarchy((4, 4), **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a positive integer, got '' in ''"),
        ("8|8", "has 2 levels and needs blocks or windows"),
        ("8|8|8@w9", r"windows must have one entry per level \(3\), got 1"),
        ("8|8v8@w4", r"value_ranks must have one entry per level \(2\), got 1"),
        ("8|8@wide", "expected a positive integer, got 'ide'"),
        ("8|a@16", r"got 'a' in '8\|a'"),
        ("8x@16", "got '' in '8x'"),
        ("8|8@16/median", "expected a number, got 'median'"),
        ("64@w*+4", "sinks need levels by window, of which one is finite"),
        ("8|8@16+4", r"sinks follow windows, as in '64v@w192\+4', got '8\|8@16\+4'"),
        ("8@w16+", r"expected a positive integer, got '' in '8@w16\+'"),
        ("8@w16+16", "sinks must be below the smallest window 16, got 16"),
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
