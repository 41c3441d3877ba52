"""The Triton backend through the common battery: on a GPU whole, under Triton's interpreter at small shapes.

The interpreter has to be asked for before Python starts, so `test_triton_interpreter.py` runs this file once more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn import Hierarchy, mlr_attention
from structattn.layers.kv_cache import KeyValueCache, mlr_cache_layout
from structattn.ops import registry, triton
from structattn.ops.call import Call
from structattn.ops.decode import mlr_decode
from tests.ops.battery import BLOCK_VALUES, DEEP, NEAR, ODD, WITHIN, Case, cases, check, definition
from tests.tolerance import assert_calibrated

ON_GPU = triton.ineligible() is None and not triton.interpreted()
if triton.ineligible() is not None:
    pytest.skip(f"{triton.ineligible()}; test_triton_interpreter.py runs this file", allow_module_level=True)

from structattn.ops.triton import decode_kernels, launch, parts  # noqa: E402  (needs Triton)

CHOICES = launch.configs
DEVICE = "cuda" if ON_GPU else "cpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the interpreter has neither bfloat16 nor tuning")
# Each promise of the op once, over few tiles: the interpreter takes milliseconds for every operation on a tile.
SMALL = (
    "flat-65-causal", "flat-7-full", "deep-100-causal", "equal-65-full", "small-100-causal", "odd-100-full",
    "offset-33-70-0-causal", "offset-5-100-95-full", "queries-past-keys", "value-width-16", "bias-axis-2",
    "bias-no-axis", "scale",
    "near-100-causal", "near-65-full", "sliding-100-causal", "sliding-65-full", "within-100-full", "within-63-causal",
    "block-values-100-causal", "block-values-65-full", "within-queries-past-keys",
)  # fmt: skip
ALONE = {"batch": 1, "heads": 1, "key_heads": 1}
ROWS = {
    "padding": Case(ODD, 70, batch=2, heads=1, key_heads=1, key_start=(0, 31), key_end=(61, 70)),
    "padding-offset": Case(DEEP, 33, 70, 37, False, 1, 1, batch=2, key_start=(50, 3), key_end=(70, 50)),
    "empty-row": Case(DEEP, 40, batch=2, heads=1, key_heads=1, key_start=(20, 40), key_end=(20, 40)),
    "gqa-bias": Case(ODD, 66, heads=4, key_heads=2, batch=1, bias=(True, True, True, True), value_width=20),
    "wide": Case(Hierarchy((260, 40), (None, 32), "mean"), 40, batch=1, heads=1, key_heads=1),
    "half": Case(DEEP, 70, batch=1, heads=1, key_heads=1, dtype=torch.float16),
    # A band between two far zones, as wide as a tile, and one at the end of what is visible.
    "bands": Case(Hierarchy((8, 8, 4), windows=(384, 192, 64), value_ranks=(4, 0, 4)), 448, value_width=8, **ALONE),
    "windows-padding": Case(
        NEAR, 130, batch=2, heads=1, key_heads=1, key_start=(0, 31), key_end=(121, 130), bias=(True, True, True, True)
    ),
    "windows-offset": Case(WITHIN, 33, 190, 157, False, 1, 1, batch=2, key_start=(50, 3), key_end=(170, 190)),
    "windows-gqa": Case(NEAR, 66, heads=2, key_heads=1, batch=1, bias=(True, False, True, True)),
    "windows-half": Case(NEAR, 100, dtype=torch.float16, **ALONE),
    "windows-wide": Case(Hierarchy((260, 40), windows=(70, 9), value_ranks=(10, 30)), 90, value_width=40, **ALONE),
    "block-values-half": Case(BLOCK_VALUES, 100, dtype=torch.float16, **ALONE),
    "block-values-padding": Case(BLOCK_VALUES, 66, batch=2, heads=2, key_heads=1, key_start=(0, 31), key_end=(61, 66)),
    "strided": Case(DEEP, 40, batch=1, bias=(True, False, True, True), strided=True),
}
ONE = ALONE | {"key_start": None, "key_end": None}
SINGLE = {name: replace(cases()[name], **ONE) for name in SMALL}
TABLE = (cases() if ON_GPU else SINGLE) | ROWS


def choose_blocks(monkeypatch, index):
    """One choice of block sizes for every kernel, the last where there are fewer: nothing is tuned."""
    monkeypatch.setattr(launch, "configs", lambda name, row: CHOICES(name, row)[: index + 1][-1:])
    launch.tuned.cache_clear()


@pytest.fixture(autouse=ON_GPU, scope="module")
def first_choice_of_blocks():
    """On a card, where to compile all of them for each kind of call would take hours."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose_blocks(monkeypatch, 0)
        yield
    launch.tuned.cache_clear()


@on_gpu
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("row", [64, 128, 256, 1024])
def test_every_choice_of_blocks(row, index, monkeypatch):
    """Tuning would only ever show the fastest."""
    choose_blocks(monkeypatch, index)
    hierarchy = Hierarchy.dyadic((row // 2, row // 4, row // 8, row // 8), 512)
    check(Case(hierarchy, 700, batch=1, value_width=min(row, 256), device=DEVICE, dtype=torch.bfloat16), "triton")


@pytest.mark.parametrize("name", TABLE)
def test_against_definition(name):
    check(replace(TABLE[name], device=DEVICE), "triton")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_against_definition_in_half_precision(name, dtype):
    check(replace(TABLE[name], device=DEVICE, dtype=dtype), "triton")


@st.composite
def drawn_blocks(draw):
    """Draw a hierarchy by block, in keys and at times in values."""
    sizes = [draw(st.sampled_from([4, 24, 32]))]
    for _ in range(draw(st.integers(0, 2))):
        sizes.append(sizes[-1] * draw(st.sampled_from([2, 3])))
    levels = len(sizes) + 1
    ranks = draw(st.lists(st.integers(1, 20), min_size=levels, max_size=levels))
    values = draw(st.none() | drawn_value_ranks(levels))
    gains = draw(st.sampled_from([None, "mean"]))
    return Hierarchy(ranks, (None, *reversed(sizes)), gains, value_ranks=values)


@st.composite
def drawn_windows(draw):
    """Draw a hierarchy by window, at times a finite first one, in keys and at times in values."""
    windows: list = sorted(draw(st.lists(st.integers(1, 90), min_size=1, max_size=3, unique=True)), reverse=True)
    if draw(st.booleans()):
        windows = [None, *windows]
    levels = len(windows)
    ranks = draw(st.lists(st.integers(1, 20), min_size=levels, max_size=levels))
    values = draw(st.none() | drawn_value_ranks(levels))
    gains = draw(st.sampled_from([None, "mean"]))
    return Hierarchy(ranks, None, gains, windows=windows, value_ranks=values)


def drawn_value_ranks(levels):
    return st.lists(st.sampled_from([0, 3, 16, 17]), min_size=levels, max_size=levels).filter(any)


@st.composite
def drawn_cases(draw, hierarchies):
    hierarchy = draw(hierarchies)
    keys = draw(st.integers(1, 80))
    queries = draw(st.integers(1, keys))
    start = draw(st.integers(0, keys))
    return Case(
        hierarchy,
        query_length=queries,
        key_length=keys,
        query_offset=draw(st.integers(0, keys - queries)),
        is_causal=draw(st.booleans()),
        batch=1,
        heads=draw(st.sampled_from([1, 2])),
        key_heads=1,
        value_width=sum(hierarchy.value_ranks or ()) or draw(st.integers(1, 20)),
        key_start=draw(st.none() | st.just((start,))),
        key_end=(draw(st.integers(start, keys)),),
        bias=draw(st.none() | st.tuples(*[st.booleans()] * 4)),
        device=DEVICE,
    )


@pytest.mark.parametrize("hierarchies", [drawn_blocks(), drawn_windows()], ids=["blocks", "windows"])
def test_drawn_cases(hierarchies):
    @settings(max_examples=40 if ON_GPU else 8, deadline=None, derandomize=True)
    @given(drawn_cases(hierarchies))
    def run(case):
        check(case, "triton")

    run()


@pytest.mark.parametrize("hierarchy", [ODD, WITHIN], ids=str)
def test_dropout_drops_what_every_backend_drops(hierarchy):
    """Output and gradients with dropout are those of the definition with the same seed."""
    query, key, value = Case(hierarchy, 66, batch=1).tensors().values()

    def run(backend, dtype, device):
        tensors = [x.to(device, dtype) for x in (query, key, value)]
        # The generator's state is the device's own, so the seed is given, as the operator takes it.
        seed = torch.tensor(2**40 + 12345, device=device)
        call = Call(*tensors, None, None, None, seed, hierarchy, True, 0.125, 0, 0.3)
        out, lse = registry.REGISTRY[backend].forward(call)
        grads = registry.REGISTRY[backend].backward(call, torch.ones_like(out), out, lse, needs_bias_grad=False)
        return [x.cpu() for x in (out, *grads[:3])]

    exact, plain = run("reference", torch.float64, "cpu"), run("reference", torch.float32, "cpu")
    for actual, wanted, near in zip(run("triton", torch.float32, DEVICE), exact, plain, strict=True):
        assert_calibrated(actual, wanted, near, largest_term=float(value.abs().max()) * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU, ids=str)
@pytest.mark.parametrize(("queries", "key_length", "start"), [(1, 300, None), (3, 290, (0, 280))])
def test_decode(dtype, queries, key_length, start):
    hierarchy = Hierarchy((20, 4, 2, 2), (None, 64, 32, 8), "mean")
    heads, key_heads, width = 4, 2, 20
    shapes = [(heads, hierarchy.rank), (key_heads, hierarchy.rank), (key_heads, width)]
    query, key, value = (torch.randn(2, count, key_length, wide).to(dtype) for count, wide in shapes)
    start = None if start is None else torch.tensor(start)
    both = definition(query, key, value, hierarchy, is_causal=True, key_start=start, enable_gqa=True)
    exact, plain = (out[:, :, -queries:] for out in both)
    # Columns and rows from `key_length` on are never read.
    keys = [torch.cat([part.mT, torch.full_like(part.mT, torch.nan)], 3) for part in key.split(hierarchy.ranks, -1)]
    actual = mlr_decode(
        query[:, :, -queries:].to(DEVICE),
        [part.to(DEVICE) for part in keys],
        torch.cat([value, torch.full_like(value, torch.nan)], 2).to(DEVICE),
        hierarchy,
        key_length=key_length,
        key_start=None if start is None else start.to(DEVICE),
        enable_gqa=True,
        backend="triton",
    )
    assert_calibrated(actual.cpu(), exact, plain, largest_term=float(value.abs().max()))


def test_decode_of_wide_rows():
    """More dimensions than one product takes, and than a tile holds."""
    hierarchy = Hierarchy((200, 90), (None, 16))
    query, key, value = torch.randn(1, 2, 1, 290), torch.randn(1, 2, 40, 290), torch.randn(1, 2, 40, 5)
    levels = [part.mT.contiguous() for part in key.split(hierarchy.ranks, -1)]
    on_device = [part.to(DEVICE) for part in levels]
    actual = mlr_decode(query.to(DEVICE), on_device, value.to(DEVICE), hierarchy, key_length=40, backend="triton")
    expected = definition(query, key, value, hierarchy, is_causal=True, query_offset=39)
    assert_calibrated(actual.cpu(), *expected, largest_term=float(value.abs().max()))


def test_decode_reads_live_keys_alone():
    hierarchy = Hierarchy((4, 3), (None, 32))
    query, key, value = torch.randn(1, 2, 1, 7), torch.randn(1, 2, 70, 7), torch.randn(1, 2, 70, 5)
    levels = [key[..., :4].mT.to(DEVICE), key[:, :, 64:, 4:].mT.to(DEVICE)]
    actual = mlr_decode(
        query.to(DEVICE), levels, value.to(DEVICE), hierarchy, key_length=70, level_starts=[0, 64], backend="triton"
    )
    expected = definition(query, key, value, hierarchy, is_causal=True, query_offset=69)
    assert_calibrated(actual.cpu(), *expected, largest_term=float(value.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU, ids=str)
@pytest.mark.parametrize(("queries", "start"), [(1, None), (3, (0, 280))])
@pytest.mark.parametrize(
    "hierarchy",
    [
        Hierarchy((20, 4, 2, 2), windows=(None, 150, 32, 1), gains="mean", value_ranks=(6, 0, 12, 2)),
        Hierarchy((16, 2), windows=(140, 9), value_ranks=(0, 20)),
        Hierarchy((16, 4), (None, 64), "mean", value_ranks=(4, 16)),
    ],
    ids=str,
)
def test_decode_of_levels_in_values(hierarchy, queries, start, dtype):
    """Each level's buffers start at the first key it reaches; all that no query reads is NaN."""
    heads, key_heads, key_length, width = 4, 2, 290, sum(hierarchy.value_ranks)
    shapes = [(heads, hierarchy.rank), (key_heads, hierarchy.rank), (key_heads, width)]
    query, key, value = (torch.randn(2, count, key_length, wide).to(dtype) for count, wide in shapes)
    bounds = None if start is None else torch.tensor(start)
    both = definition(query, key, value, hierarchy, is_causal=True, key_start=bounds, enable_gqa=True)
    exact, plain = (out[:, :, -queries:] for out in both)

    positions = [key_length - queries - first for first in start or (0, 0)]
    firsts = [
        min(first + max(hierarchy.span(level, at)[0], 0) for first, at in zip(start or (0, 0), positions, strict=True))
        for level in range(hierarchy.levels)
    ]
    gap = torch.full((2, key_heads, 5, 1), torch.nan, dtype=dtype)

    def live(tensor, widths):
        parts = zip(tensor.split(list(widths), -1), firsts, strict=True)
        return [torch.cat([part[:, :, first:], gap.expand(-1, -1, -1, part.shape[3])], 2) for part, first in parts]

    actual = mlr_decode(
        query[:, :, -queries:].to(DEVICE),
        [part.mT.contiguous().to(DEVICE) for part in live(key, hierarchy.ranks)],
        [part.to(DEVICE) for part in live(value, hierarchy.value_ranks)],
        hierarchy,
        key_length=key_length,
        level_starts=firsts,
        key_start=None if bounds is None else bounds.to(DEVICE),
        enable_gqa=True,
        backend="triton",
    )
    assert_calibrated(actual.cpu(), exact, plain, largest_term=float(value.abs().max()))


def _live_levels(tensor, widths, hierarchy, key_length, first_query):
    """Return each level's live entries of the last queries, `(B, H, n, width)`, and their first indices."""
    firsts = [max(hierarchy.span(level, first_query)[0], 0) for level in range(hierarchy.levels)]
    parts = zip(tensor[:, :, :key_length].split(list(widths), -1), firsts, strict=True)
    return [part[:, :, first:] for part, first in parts], firsts


@pytest.mark.parametrize(
    ("queries", "start", "is_aligned", "dtype"),
    [
        (1, None, True, torch.float32),
        (3, (0, 210), True, torch.float16),
        (1, None, False, torch.float16),
        *[(3, (0, 210), True, torch.bfloat16)] * ON_GPU,
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "hierarchy",
    [
        Hierarchy((16, 8, 8), windows=(None, 900, 400), gains="mean", value_ranks=(8, 0, 16)),
        Hierarchy((16, 8, 8), windows=(1100, 700, 400), value_ranks=(0, 8, 16)),
        Hierarchy((16, 8), (None, 1024), "mean", value_ranks=(8, 16)),
        Hierarchy.flat(40),
    ],
    ids=str,
)
def test_decode_of_long_runs(hierarchy, queries, start, is_aligned, dtype):
    """Runs of tiles at one depth have loops of their own, without masks. All that no query reads is NaN."""
    key_length, width = 1301, sum(hierarchy.value_ranks or (24,))
    shapes = [(4, hierarchy.rank), (2, hierarchy.rank), (2, width)]
    query, key, value = (torch.randn(2, count, key_length, wide).to(dtype) for count, wide in shapes)
    bounds = None if start is None else torch.tensor(start)
    both = definition(query, key, value, hierarchy, is_causal=True, key_start=bounds, enable_gqa=True)
    exact, plain = (out[:, :, -queries:] for out in both)
    first_query = key_length - queries - (0 if start is None or hierarchy.by_window else max(start))

    def stored(live, first, axis):
        """Return live entries at the position of their index modulo 16, or one past it, amid NaN."""
        lead = first % 16 + (not is_aligned)
        shape = list(live.shape)
        shape[axis] = -(-(lead + shape[axis] + 1) // 64) * 64
        storage = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        storage.narrow(axis, lead, live.shape[axis]).copy_(live)
        return storage.narrow(axis, lead, shape[axis] - lead)

    keys, firsts = _live_levels(key, hierarchy.ranks, hierarchy, key_length, first_query)
    values, _ = _live_levels(value, hierarchy.value_widths(width), hierarchy, key_length, first_query)
    key_levels = [stored(live.mT, first, -1) for live, first in zip(keys, firsts, strict=True)]
    owners = [first for live, first in zip(values, firsts, strict=True) if live.shape[3]]
    value_levels = [stored(live, first, -2) for live, first in zip(values, firsts, strict=True)]
    assert (decode_kernels.aligned_views(key_levels, firsts, 3) is not None) == is_aligned
    owned = [each for each in value_levels if each.shape[3]]
    assert decode_kernels.aligned_views(owned, owners, 2) is not None
    actual = mlr_decode(
        query[:, :, -queries:].to(DEVICE),
        key_levels,
        value_levels,
        hierarchy,
        key_length=key_length,
        level_starts=firsts,
        key_start=None if bounds is None else bounds.to(DEVICE),
        enable_gqa=True,
        backend="triton",
    )
    assert_calibrated(actual.cpu(), exact, plain, largest_term=float(value.abs().max()))


def test_steps_of_runs():
    """A step loads 16 KiB, at any depth; levels without room for a run have none."""
    windows = (parts.WHOLE, 1024, 256)
    smallest, runs = decode_kernels.steps_of((32, 32, 64), windows, (32, 32, 64), windows, 2)
    assert (smallest, runs) == ((32, 4), ((128, 4), (64, 4), (32, 4)))
    _, runs = decode_kernels.steps_of((8,) * 4, (parts.WHOLE, 700, 690, 32), (64,), (parts.WHOLE,), 2)
    assert [keys > 0 for keys, _ in runs] == [True, False, True, False]
    smallest, _ = decode_kernels.steps_of((64,) * 8, (parts.WHOLE,) * 8, (256,), (parts.WHOLE,), 2)
    assert smallest == (32, 2)  # few keys are many bytes


def test_a_cache_is_aligned_at_every_token():
    hierarchy = Hierarchy((16, 8, 8), windows=(None, 90, 37), value_ranks=(8, 0, 16))
    cache = KeyValueCache(mlr_cache_layout(hierarchy, 2, 24))
    for count in [70, *[1] * 200, 33, *[1] * 100]:
        cache.append(
            [torch.zeros(1, 2, count, rank).half() for rank in (16, 8, 8)],
            [torch.zeros(1, 2, count, width).half() for width in (8, 16)],
        )
        cache.forget()
        for buffers, axis in ((cache.keys, 3), (cache.values, 2)):
            firsts = [buffer.first for buffer in buffers]
            found = decode_kernels.aligned_views([buffer.storage for buffer in buffers], firsts, axis)
            assert found is not None
            for view, start, buffer in zip(*found, buffers, strict=True):
                assert (view.data_ptr() % 16, start % 16) == (0, 0)
                ahead = (buffer.first - start) * view.stride(axis) * view.itemsize
                assert view.data_ptr() + ahead == buffer.live.data_ptr()


def test_levels_that_no_tile_reaches_cost_nothing():
    """Keys and values beyond a window are not read: NaN among them changes nothing."""
    hierarchy = Hierarchy((8, 4), windows=(40, 9), value_ranks=(3, 5))
    query, key, value = Case(hierarchy, 260, 260, value_width=8, **ALONE).tensors().values()
    seed = [None, None, None, None]

    def run(key, value):
        query_on, key_on, value_on = (x.to(DEVICE) for x in (query, key, value))
        call = Call(query_on[:, :, 200:], key_on, value_on, *seed, hierarchy, True, 0.3, 200, 0.0)
        return triton.forward(call)[0]

    expected = run(key, value)
    key[:, :, :128], value[:, :, :128] = torch.nan, torch.nan
    assert torch.equal(run(key, value), expected)


@pytest.mark.skipif(ON_GPU, reason="about the interpreter")
def test_interpreter_serves_by_name_alone():
    query = torch.randn(1, 1, 4, 8)
    call = Call(query, query, query, None, None, None, None, Hierarchy.flat(8), True, 1.0, 0, 0.0)
    assert triton.ineligible(call) is None
    assert registry.choose("auto", call) is not registry.REGISTRY["triton"]
    assert "bfloat16" in str(triton.ineligible(replace(call, query=query.bfloat16())))


@on_gpu
def test_auto_takes_the_kernels_on_a_gpu():
    query = torch.randn(1, 1, 4, 8, device="cuda")
    call = Call(query, query, query, None, None, None, None, Hierarchy.flat(8), True, 1.0, 0, 0.0)
    assert registry.choose("auto", call) is registry.REGISTRY["triton"]


@on_gpu
def test_backward_is_deterministic():
    query, key, value = (torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run():
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = mlr_attention(*leaves, DEEP, is_causal=True, backend="triton")
        return torch.autograd.grad(out.float().square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
