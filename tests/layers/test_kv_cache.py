"""The key-value cache: it gives what one call gives, and keeps only what can be read again."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structattn import Hierarchy
from structattn.layers import Attention, KeyValueCache, RotaryEmbedding, build_attention
from structattn.layers.kv_cache import attend_mlr_cache, mlr_cache_layout
from structattn.layers.kv_cache.growing_buffer import ALIGNMENT, QUANTUM, GrowingBuffer
from structattn.layers.norm import LevelNorm
from structattn.ops import mlr_attention, operator
from tests.layers.cases import CLOSE, ROTARY, SPELLINGS, build, each_kind, tokens
from tests.tolerance import assert_calibrated

LENGTH = 53  # past three contexts of 16, and a multiple of no block


@torch.no_grad()
def in_chunks(layer: Attention, x: torch.Tensor, chunks: list[int], key_start=None) -> torch.Tensor:
    """Return the output of the layer for `x`, read in chunks of these lengths."""
    cache = layer.new_cache()
    parts = x.split(chunks, dim=1)
    return torch.cat([layer(part, key_start=key_start, cache=cache) for part in parts], dim=1)


CHUNKS = {
    "one by one": [1] * LENGTH,
    "fives": [5] * 10 + [3],
    "a prompt, then one by one": [20, *[1] * 33],
    "long chunks after a prompt": [17, 30, 6],
}


@each_kind
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("padding", [None, [0, 3, 25]], ids=["unpadded", "padded"])
def test_reading_in_chunks_is_reading_at_once(spelling, chunks, padding):
    layer, x = build(spelling), tokens(3, LENGTH)
    key_start = None if padding is None else torch.tensor(padding)
    whole, chunked = layer(x, key_start=key_start), in_chunks(layer, x, chunks, key_start)
    for row, start in enumerate(padding or [0, 0, 0]):
        torch.testing.assert_close(chunked[row, start:], whole[row, start:], **CLOSE)


@pytest.mark.parametrize("spelling", ROTARY)
@pytest.mark.parametrize("padding", [None, [0, 3, 25]], ids=["unpadded", "padded"])
def test_with_a_rotary_embedding(spelling, padding):
    layer, x = build(spelling, rotary=RotaryEmbedding()), tokens(3, LENGTH)
    key_start = None if padding is None else torch.tensor(padding)
    chunked = in_chunks(layer, x, [11, 2, *[1] * 40], key_start)
    whole = build(spelling, rotary=RotaryEmbedding())(x, key_start=key_start)
    for row, start in enumerate(padding or [0, 0, 0]):
        torch.testing.assert_close(chunked[row, start:], whole[row, start:], **CLOSE)


@each_kind
def test_under_autocast(spelling, monkeypatch):
    """Also where norms give float32, as a GPU's autocast has it: what is kept has the type that attention reads."""
    layer, x = build(spelling), tokens(2, LENGTH)
    exact = layer(x).detach()
    monkeypatch.setattr(LevelNorm, "forward", lambda self, x, norm=LevelNorm.forward: norm(self, x.float()))
    layer, x = layer.float(), x.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, chunked = layer(x), in_chunks(layer, x, [20, 11, 3, *[1] * 19])
        cache = layer.new_cache()
        layer(x, cache=cache)
    assert {timeline.storage.dtype for timeline in (*cache.keys, *cache.values)} == {torch.bfloat16}
    assert_calibrated(chunked, exact, whole)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chunks_and_crops(data):
    """Tokens taken back and read again leave no trace."""
    layer = build(data.draw(st.sampled_from(SPELLINGS)))
    x = tokens(2, LENGTH)
    cache, read, parts = layer.new_cache(), 0, {}
    cache.recording = True
    while read < LENGTH:
        count = data.draw(st.integers(1, LENGTH - read))
        with torch.no_grad():
            out = layer(x[:, read : read + count], cache=cache)
        parts |= {read + index: out[:, index] for index in range(count)}
        taken_back = data.draw(st.integers(0, count - 1))
        read += count - taken_back
        cache.crop(read)
    chunked = torch.stack([parts[index] for index in range(LENGTH)], dim=1)
    torch.testing.assert_close(chunked, layer(x), **CLOSE)


@each_kind
def test_live_key_numbers_are_those_stated(spelling):
    layer, x, cache = build(spelling), tokens(2, LENGTH), None
    cache = layer.new_cache()
    assert cache.key_numbers == 0
    for length in range(1, LENGTH + 1):
        with torch.no_grad():
            layer(x[:, length - 1 : length], cache=cache)
        assert cache.key_numbers == layer.key_numbers(length)
        assert cache.value_numbers == layer.value_numbers(length)
        assert cache.key_numbers + cache.value_numbers == layer.cache_numbers(length)
    prefilled = layer.new_cache()
    with torch.no_grad():
        layer(x, cache=prefilled)
    assert prefilled.key_numbers == layer.key_numbers(LENGTH)


@each_kind
def test_storage_is_owned_and_little_larger_than_what_is_live(spelling):
    layer, x = build(spelling), tokens(2, LENGTH)
    cache, constant = layer.new_cache(), QUANTUM * 2 * 8 * layer.key_numbers(1)
    for length in range(1, LENGTH + 1):
        with torch.no_grad():
            layer(x[:, length - 1 : length], cache=cache)
        sinks = 0 if cache.sinks is None else cache.sinks.key_bytes
        assert cache.key_bytes <= 1.25 * cache.key_numbers * 2 * 8 + constant + sinks
        assert sinks == 2 * 8 * layer.key_numbers(1) * cache.layout.sinks
        for timeline in (*cache.keys, *cache.values):
            assert timeline._storage._base is None
            assert timeline.nbytes == timeline._storage.numel() * 8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_buffer_holds_what_was_appended_and_not_dropped(data):
    axis = data.draw(st.sampled_from((-1, -2)))
    buffer, expected = GrowingBuffer(axis), torch.zeros(1, 0, 3)
    for _ in range(data.draw(st.integers(1, 30))):
        count = data.draw(st.integers(1, 100))
        entries = torch.randn(1, count, 3)
        buffer.append(entries if axis == -2 else entries.mT)
        expected = torch.cat([expected, entries], 1)
        buffer.drop_before(data.draw(st.integers(0, buffer.end)))
        if data.draw(st.booleans()):
            buffer.crop(data.draw(st.integers(0, buffer.end)))
            expected = expected[:, : buffer.end]
        for view in (buffer.live, buffer.storage.narrow(axis, 0, buffer.end - buffer.first)):
            assert torch.equal(view if axis == -2 else view.mT, expected[:, buffer.first :])
        assert buffer.end == expected.shape[1]
        assert (buffer.storage.storage_offset() // buffer.storage.stride(axis) - buffer.first) % ALIGNMENT == 0
        assert buffer.nbytes <= (buffer.end - buffer.first + 2 * QUANTUM) * 3 * 4


def test_a_window_copies_its_entries_rarely(monkeypatch):
    moves = []
    monkeypatch.setattr(GrowingBuffer, "_move", lambda *args, move=GrowingBuffer._move: moves.append(move(*args)))
    buffer = GrowingBuffer(-2)
    for index in range(20 * QUANTUM):
        buffer.append(torch.zeros(1, 1, 2))
        buffer.drop_before(index - 2 * QUANTUM)
    assert len(moves) <= 25


def test_the_keys_of_a_long_sequence_take_a_seventh():
    hierarchy = Hierarchy.dyadic([8] * 8, 8192)
    cache, whole = KeyValueCache(mlr_cache_layout(hierarchy, 1, 1)), 65_536 * 64 * 4
    for _ in range(64):
        keys = torch.zeros(1, 1, 1024, 64)
        cache.append(keys.split(hierarchy.ranks, dim=-1), [keys[..., :1]])
        cache.forget()
    assert cache.length == 65_536
    assert cache.key_numbers == hierarchy.key_numbers(65_536)
    assert cache.key_bytes <= whole / 7


@pytest.mark.parametrize("spelling", ["mlr+paper", "mlr:3|1v1|3@w20|5+3"])
def test_beams_go_on_from_other_rows(spelling):
    layer, x = build(spelling), tokens(3, LENGTH)
    rows, cache = torch.tensor([2, 0, 0, 1]), layer.new_cache()
    key_start = torch.tensor([0, 3, 7])
    with torch.no_grad():
        layer(x[:, :21], key_start=key_start, cache=cache)
        cache.take_rows(rows)
        out = torch.cat(
            [layer(x[rows, at : at + 1], key_start=key_start[rows], cache=cache) for at in range(21, LENGTH)], dim=1
        )
    torch.testing.assert_close(out, layer(x, key_start=key_start)[rows, 21:], **CLOSE)


WINDOWS = Hierarchy((2, 4, 2), None, "mean", windows=(None, 16, 5), value_ranks=(4, 0, 3))
KEPT = {
    "windows, values": WINDOWS,
    "windows alone": Hierarchy((2, 4, 2), windows=(40, 16, 5)),
    "no values at level 1": Hierarchy((2, 4, 2), windows=(None, 16, 5), value_ranks=(0, 4, 3)),
    "values at level 3 alone": Hierarchy((2, 4, 2), windows=(None, 16, 5), value_ranks=(0, 0, 7)),
    "blocks, values": Hierarchy((2, 4, 2), (None, 12, 4), "mean", value_ranks=(2, 5, 0)),
    "a sliding window": Hierarchy((8,), windows=(9,)),
    "a sliding window, sinks": Hierarchy((8,), windows=(9,), sinks=8),
    "windows, values, sinks": WINDOWS.with_sinks(3),
    "windows alone, sinks": Hierarchy((2, 4, 2), None, (1.0, 0.5, 0.7), windows=(40, 16, 5), sinks=4),
}
"""Hierarchies of rank 8 for values of width 7."""


@torch.no_grad()
def read_by_level(hierarchy, operands, chunks, key_start=None, attn_bias=None):
    """Return what `attend_mlr_cache` gives for operands read in chunks."""
    query, key, value = operands
    cache, parts = KeyValueCache(mlr_cache_layout(hierarchy, key.shape[1], value.shape[3])), []
    for q, k, v in zip(*(each.split(chunks, 2) for each in (query, key, value)), strict=True):
        cache.append(k.split(cache.layout.key_widths, -1), v.split(cache.layout.value_widths, -1))
        read = cache.length - q.shape[2]
        bias = None if attn_bias is None else attn_bias[..., read : cache.length, : cache.length]
        begun = None if key_start is None else key_start.clamp(max=cache.length)
        parts.append(attend_mlr_cache(q, cache, hierarchy, scale=0.5, key_start=begun, attn_bias=bias))
        cache.forget(key_start)
    return torch.cat(parts, 2)


def operands(rows=3, length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 4, length, 8), (rows, 2, length, 8), (rows, 2, length, 7))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("hierarchy", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("padding", [None, [0, 3, 25]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_levels_are_read_as_in_one_call(hierarchy, chunks, padding, biased):
    given = operands()
    key_start = None if padding is None else torch.tensor(padding)
    bias = torch.randn(3, 1, LENGTH, LENGTH, dtype=torch.float64) if biased else None
    expected = mlr_attention(*given, hierarchy, is_causal=True, scale=0.5, attn_bias=bias, key_start=key_start,
                             enable_gqa=True, backend="reference")  # fmt: skip
    torch.testing.assert_close(read_by_level(hierarchy, given, chunks, key_start, bias), expected, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_chunks_starts_and_crops_by_level(data):
    """Also where some rows are all padding at first, and where the cache keeps more than is read."""
    hierarchy = data.draw(st.sampled_from(list(KEPT.values())))
    starts = data.draw(st.none() | st.lists(st.integers(0, LENGTH), min_size=3, max_size=3))
    key_start = None if starts is None else torch.tensor(starts)
    given = operands()
    bias = torch.randn(4, LENGTH, 1, dtype=torch.float64) if data.draw(st.booleans()) else None
    cache, read, parts = KeyValueCache(mlr_cache_layout(hierarchy, 2, 7)), 0, {}
    cache.recording = data.draw(st.booleans())
    while read < LENGTH:
        count = data.draw(st.integers(1, LENGTH - read))
        q, k, v = (each[:, :, read : read + count] for each in given)
        cache.append(k.split(cache.layout.key_widths, -1), v.split(cache.layout.value_widths, -1))
        begun = None if key_start is None else key_start.clamp(max=cache.length)
        part = None if bias is None else bias[:, read : read + count]
        out = attend_mlr_cache(q, cache, hierarchy, scale=0.5, key_start=begun, attn_bias=part)
        parts |= {read + index: out[:, :, index] for index in range(count)}
        cache.forget(key_start)
        read += count
        if cache.recording:
            read -= data.draw(st.integers(0, count - 1))
            cache.crop(read)
    expected = mlr_attention(*given, hierarchy, is_causal=True, scale=0.5, attn_bias=bias, key_start=key_start,
                             enable_gqa=True, backend="reference")  # fmt: skip
    torch.testing.assert_close(torch.stack([parts[index] for index in range(LENGTH)], 2), expected, **CLOSE)


class Allocations(TorchDispatchMode):
    """Records the bytes of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        known = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        made = [each.untyped_storage() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.sizes += [each.nbytes() for each in made if each.data_ptr() not in known]
        return out


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@torch.no_grad()
def test_a_chunk_takes_memory_for_itself_and_what_is_live(biased):
    """Keys and values of full length are never joined. What the op makes inside is not counted."""
    hierarchy, length, chunk = Hierarchy((2, 30), windows=(None, 40), value_ranks=(2, 30)), 4000, 50
    cache = KeyValueCache(mlr_cache_layout(hierarchy, 1, 32))
    for count in (length, chunk):
        cache.append(*([torch.zeros(1, 1, count, width) for width in (2, 30)] for _ in range(2)))
        cache.forget() if count == length else None
    bias = torch.zeros(1, 1, 1, length + chunk) if biased else None
    with Allocations() as made:
        attend_mlr_cache(torch.zeros(1, 1, chunk, 32), cache, hierarchy, scale=1.0, key_start=None, attn_bias=bias)
    assert max(made.sizes) <= (40 + chunk) * 32 * 4


@pytest.mark.parametrize("hierarchy", KEPT.values(), ids=KEPT)
def test_live_numbers_are_those_of_the_hierarchy(hierarchy):
    cache = KeyValueCache(mlr_cache_layout(hierarchy, 3, 7))
    for length in range(1, 60):
        cache.append(*([torch.zeros(2, 3, 1, width) for width in widths] for widths in
                       (cache.layout.key_widths, cache.layout.value_widths)))  # fmt: skip
        cache.forget()
        assert cache.key_numbers == 3 * hierarchy.key_numbers(length)
        assert cache.value_numbers == 3 * hierarchy.value_numbers(length, 7)
        assert cache.key_numbers + cache.value_numbers == 3 * hierarchy.cache_numbers(length, 7)


def test_sinks_stay_and_are_found_once():
    """Starts of rows are read once, after the first tokens; windows are the same as without sinks."""
    hierarchy = WINDOWS.with_sinks(3)
    cache, starts = KeyValueCache(mlr_cache_layout(hierarchy, 1, 7)), torch.tensor([0, 4])
    tokens_ = torch.arange(60.0).view(1, 1, 60, 1) + torch.tensor([0, 100]).view(2, 1, 1, 1)
    for at in range(60):
        part = tokens_[:, :, at : at + 1]
        cache.append([part.expand(2, 1, 1, width) for width in (2, 4, 2)], [part.expand(2, 1, 1, w) for w in (4, 3)])
        cache.forget(starts if at < 7 else torch.zeros(2, dtype=torch.int64, device="meta"))
    assert [buffer.first for buffer in (*cache.keys, *cache.values)] == [0, 44, 55, 0, 55]
    assert cache.sinks.keys.shape == (2, 1, 3, 8)
    assert cache.sinks.values[:, 0, :, 6].tolist() == [[0, 1, 2], [104, 105, 106]]
    cache.take_rows(torch.tensor([1, 1, 0]))
    assert cache.sinks.keys[:, 0, 0, 5].tolist() == [104, 104, 0]
    assert cache.nbytes - cache.key_bytes == sum(each.nbytes for each in cache.values) + 4 * 3 * 3 * 7
    cache.reset()
    assert (cache.nbytes, cache.sinks.end) == (0, 0)


def test_windows_read_no_key_start():
    cache = KeyValueCache(mlr_cache_layout(WINDOWS, 1, 7))
    cache.append(
        [torch.zeros(2, 1, 30, width) for width in (2, 4, 2)], [torch.zeros(2, 1, 30, width) for width in (4, 3)]
    )
    cache.forget(torch.zeros(2, dtype=torch.int64, device="meta"))  # whose numbers cannot be read
    assert [buffer.first for buffer in (*cache.keys, *cache.values)] == [0, 14, 25, 0, 25]


def test_the_query_side_keeps_one_vector_for_all_heads():
    """Training contracts on the split side, generation on the query side: the same numbers."""
    free, fixed = build("btt"), build("btt+side=split")
    assert free.cached_side == "query"
    assert [(part.heads, part.width) for part in free.cache_layout().keys] == [(1, 16), (4, 2)]
    without_norm = build("btt:2+norm=none")
    assert [(part.heads, part.width) for part in without_norm.cache_layout().keys] == [(1, 16)]
    assert without_norm.key_numbers(100) == 100 * 16
    x = tokens(2, LENGTH)
    torch.testing.assert_close(in_chunks(free, x, [1] * LENGTH), fixed(x), **CLOSE)


def test_windows_keep_their_window():
    layer, cache = build("swa:3"), build("swa:3").new_cache()
    with torch.no_grad():
        layer(tokens(1, 20), cache=cache)
    assert (cache.keys[0].first, cache.values[0].first, cache.length) == (17, 17, 20)


class OnMeta:
    """Layer and cache on the meta device, where no number can be read."""

    def __init__(self, layer, cache):
        self.layer, self.cache = layer.to("meta"), cache
        for buffer in (*cache.keys, *cache.values):
            buffer._storage = buffer._storage.to("meta")
        if cache.sinks is not None:
            cache.sinks.keys, cache.sinks.values = cache.sinks.keys.to("meta"), cache.sinks.values.to("meta")

    @torch.no_grad()
    def read(self, x, key_start):
        return self.layer(x.to("meta"), key_start=key_start.to("meta"), cache=self.cache)


class TestDeviceNumbers:
    """A number that is read from an accelerator stalls it: none is read while decoding."""

    @pytest.fixture
    def meta_device(self, monkeypatch):
        """The meta device knows no autocast, and PyTorch's backends, which serve it, read numbers as on a CPU."""
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(
            operator, "attend", lambda call, _: call.query.new_empty(*call.query.shape[:3], call.value.shape[3])
        )

    @torch.no_grad()
    def prefilled(self, spelling, starts, length=21):
        layer = build(spelling)
        cache = layer.new_cache()
        layer(tokens(2, length), key_start=torch.tensor(starts), cache=cache)
        return OnMeta(layer, cache)

    @each_kind
    @pytest.mark.usefixtures("meta_device")
    def test_decoding_reads_none(self, spelling):
        starts = torch.tensor([0, 3])
        decoder = self.prefilled(spelling, starts.tolist())
        for _ in range(30):  # across edges of all blocks
            assert decoder.read(tokens(2, 1), starts).shape == (2, 1, 16)
        decoder.cache.take_rows(torch.tensor([1, 1, 0], device="meta"))
        decoder.read(tokens(3, 1), starts[[1, 1, 0]])
        assert decoder.cache.length == 52

    @each_kind
    def test_what_is_kept_is_the_same(self, spelling):
        """The cache keeps what it would if starts of rows were read at every token."""
        layer, x, starts = build(spelling), tokens(2, LENGTH), torch.tensor([0, 3])
        once, often = layer.new_cache(), layer.new_cache()
        for at in range(LENGTH):
            with torch.no_grad():
                for cache in (once, often):
                    layer(x[:, at : at + 1], key_start=starts, cache=cache)
            often._rows_have_begun = False
            assert [each.first for each in once.keys] == [each.first for each in often.keys]

    @pytest.mark.usefixtures("meta_device")
    def test_a_row_that_is_all_padding_so_far_is_read_until_it_begins(self):
        decoder = self.prefilled("mlr+paper", [0, 21])
        with pytest.raises(NotImplementedError, match="meta"):
            decoder.read(tokens(2, 1), torch.tensor([0, 22]))
        assert not decoder.cache._rows_have_begun

    def test_a_crop_before_a_row_begins_has_it_read_again(self):
        layer, x = build("mlr+paper"), tokens(2, LENGTH)
        cache = layer.new_cache()
        cache.recording = True
        with torch.no_grad():
            layer(x[:, :30], key_start=torch.tensor([0, 20]), cache=cache)
            cache.crop(11)
            later = torch.tensor([0, 13])
            out = torch.cat([layer(x[:, at : at + 1], key_start=later, cache=cache) for at in range(11, LENGTH)], 1)
        torch.testing.assert_close(out[1, 2:], layer(x, key_start=later)[1, 13:], **CLOSE)


class TestBadInput:
    def cache(self, spelling="mlr+paper", length=21, **options):
        layer = build(spelling, **options)
        cache = layer.new_cache()
        with torch.no_grad():
            layer(tokens(2, length), cache=cache)
        return layer, cache

    def test_a_crop_past_what_was_dropped(self):
        _, cache = self.cache()  # blocks of 8: level 2 starts at 16
        with pytest.raises(ValueError, match="reads back to token 8, and what came before token 16 is dropped"):
            cache.crop(15)
        assert cache.length == 21
        cache.crop(17)
        assert cache.length == 17

    def test_a_crop_to_more_than_there_is(self):
        _, cache = self.cache()
        with pytest.raises(ValueError, match="between 0 and the 21 tokens in the cache, got 22"):
            cache.crop(22)

    def test_a_crop_to_nothing_starts_anew(self):
        layer, cache = self.cache(length=3)
        cache.crop(0)
        with torch.no_grad():
            again = layer(tokens(5, 9), cache=cache)
        torch.testing.assert_close(again, layer(tokens(5, 9)), **CLOSE)

    @pytest.mark.parametrize("length", [0, 8])
    def test_a_crop_to_the_edge_of_a_block_needs_nothing_of_the_block_before(self, length):
        """Level 2 has dropped what came before token 16, and later queries read none of it."""
        layer, x = build("mlr+paper"), tokens(2, LENGTH)
        cache = layer.new_cache()
        with torch.no_grad():
            layer(x[:, :21], cache=cache)
        cache.crop(length)
        assert cache.length == length
        with pytest.raises(ValueError, match="cannot crop 8 tokens to 7") if length else nullcontext():
            cache.crop(max(length - 1, 0))
        with torch.no_grad():
            again = [layer(part, cache=cache) for part in x[:, length:].split([1, 9, 4, 39 - length], 1)]
        torch.testing.assert_close(torch.cat(again, 1), layer(x)[:, length:], **CLOSE)

    def test_a_crop_into_the_padding_of_all_rows(self):
        layer, x, cache = build("mlr+paper"), tokens(2, LENGTH), build("mlr+paper").new_cache()
        with torch.no_grad():
            layer(x[:, :21], key_start=torch.tensor([20, 20]), cache=cache)
            cache.crop(10)
            later = torch.tensor([12, 14])
            out = torch.cat([layer(x[:, at : at + 1], key_start=later, cache=cache) for at in range(10, LENGTH)], 1)
        for row, start in enumerate(later.tolist()):
            whole = layer(x, key_start=later)[row, start:]
            torch.testing.assert_close(out[row, start - 10 :], whole, **CLOSE)

    def test_another_hierarchy(self):
        _, cache = self.cache()
        with pytest.raises(
            ValueError, match=r"cache is of another layer: it holds keys 4 x 2, 4 x 2 in blocks of 8; values"
        ):
            build("mlr:1|1|2+paper")(tokens(2, 1), cache=cache)

    def test_another_batch_size(self):
        layer, cache = self.cache()
        with pytest.raises(ValueError, match="x must have the 2 rows of the cache, got 3"):
            layer(tokens(3, 1), cache=cache)

    def test_gradients(self):
        layer = build("mlr+paper")
        with pytest.raises(ValueError, match="a cache carries no gradients"):
            layer(tokens(2, 1), cache=layer.new_cache())

    def test_padding_on_the_right(self):
        layer, cache = self.cache()
        with pytest.raises(ValueError, match="key_end must be None with a cache"):
            layer(tokens(2, 1), key_end=torch.tensor([1, 1]), cache=cache)

    def test_no_causality(self):
        layer = build("mlr", is_causal=False)
        with pytest.raises(ValueError, match="cache must be None where is_causal is False"):
            layer(tokens(2, 1), cache=layer.new_cache())

    def test_something_else(self):
        with pytest.raises(TypeError, match="cache must be a KeyValueCache"):
            build("mlr+paper")(tokens(2, 1), cache={})

    def test_parts_of_other_widths(self):
        cache = KeyValueCache(mlr_cache_layout(Hierarchy.dyadic([4, 2], 8), 2, 6))
        with pytest.raises(ValueError, match=r"must be \(1, 2, 3, 2\); got \(1, 2, 3, 1\)"):
            cache.append([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 1)], [torch.zeros(1, 2, 3, 6)])

    def test_empty(self):
        cache = build_attention("mlr+paper", 16, 4, 16).new_cache()
        assert cache.rows is None
        with pytest.raises(ValueError, match="the cache is empty"):
            _ = cache.values[0].live
