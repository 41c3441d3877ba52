"""Layers with a native sliding window keep it, or take levels within it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.integrations.transformers.masks import mlr_mask, split_window
from structattn.models.transformers_internals import CACHE
from tests.integrations import dense
from tests.integrations.families import (
    HEAD,
    SLIDING,
    assert_calibrated_gradients,
    gradients,
    inputs,
    make,
    mask,
    real_logits,
    tokens,
)
from tests.integrations.test_generation import MODES, repetitive, write
from tests.tolerance import assert_calibrated

WINDOW = 9
FLAT = Hierarchy.flat(HEAD)
WITHIN = Hierarchy.parse("2|2|4v4|0|4@w12|4/1|0.7|0.4")
WIDER = Hierarchy.parse("2|2|4v4|1|3@w*|12|4/1|0.7|0.4")
BLOCKS = Hierarchy((2, 6), (None, 6))


def sliding(family, **fields):
    return make(family, **SLIDING[family] | {"sliding_window": WINDOW} | fields)


def caches(model):
    """The compressed cache, the default of `generate`, and one that keeps what the window hides."""
    return st.make_cache(model), None, DynamicCache()


@pytest.mark.parametrize("family", SLIDING)
class TestEveryFamily:
    @pytest.mark.parametrize("padding", ["none", "left", "right"])
    def test_one_level_is_the_models_own_attention(self, family, padding):
        model, given = sliding(family), inputs(family, padding)
        plain, plain_grads = real_logits(model, given).detach(), gradients(model, given)
        exact, exact_grads = real_logits(model.double(), given).detach(), gradients(model, given)
        st.set_hierarchy(model.float(), FLAT)
        assert_calibrated(real_logits(model, given).detach(), exact, plain)
        assert_calibrated_gradients(gradients(model, given), exact_grads, plain_grads)
        whole = make(family, dtype=torch.float64, **SLIDING[family])
        assert (real_logits(whole, given) - exact).abs().max() > 1e-3

    def test_padding_between_tokens(self, family):
        real = torch.ones(2, 21, dtype=torch.bool)
        real[1, [0, 4, 5, 12]] = False
        model, given = sliding(family, dtype=torch.float64), {"input_ids": tokens(), "attention_mask": real.long()}
        expected = real_logits(model, given).detach()
        st.set_hierarchy(model, FLAT)
        assert_calibrated(real_logits(model, given).detach(), expected, expected)

    @pytest.mark.parametrize("padding", ["none", "left", "right"])
    def test_levels_lie_within_the_window(self, family, padding):
        """The oracle adds the model's own mask to the levels."""
        model, given, levels = sliding(family, dtype=torch.float64), inputs(family, padding), [WITHIN, WIDER]
        dense.install(model, {"decoder": levels})
        expected, expected_grads = real_logits(model, given).detach(), gradients(model, given)
        st.set_hierarchy(model, levels)
        assert st.get_hierarchy(model) == {"decoder": levels}
        assert_calibrated(real_logits(model, given).detach(), expected, expected)
        assert_calibrated_gradients(gradients(model, given), expected_grads, expected_grads)

    @pytest.mark.parametrize(
        ("levels", "mode", "padding"),
        [(FLAT, "greedy", "left"), (WIDER, "greedy", "none"), (WITHIN, "beam", "left"), (WIDER, "sampling", "left")],
    )
    def test_tokens_are_those_of_a_full_recompute(self, family, levels, mode, padding):
        model, x, real = sliding(family), tokens(), mask(padding)
        own = write(model, x, real, **MODES[mode])
        st.set_hierarchy(model, levels)
        expected = write(model, x, real, cache=False, **MODES[mode])
        for cache in caches(model):
            assert torch.equal(write(model, x, real, cache, **MODES[mode]), expected)
        assert torch.equal(own, expected) == (levels == FLAT)

    def test_tokens_are_taken_back(self, family):
        model, x = sliding(family), repetitive()
        st.set_hierarchy(model, WIDER)
        expected = write(model, x, cache=False, no_repeat_ngram_size=0)
        for cache in (st.make_cache(model), None):
            assert torch.equal(write(model, x, cache=cache, **MODES["lookup"]), expected)

    @pytest.mark.parametrize("levels", [FLAT, WIDER])
    @pytest.mark.parametrize("chunk", [1, 7, 23])
    def test_logits_from_a_cache_are_those_of_a_full_recompute(self, family, levels, chunk):
        model, x = sliding(family, dtype=torch.float64), tokens(length=40)
        st.set_hierarchy(model, levels)
        with torch.no_grad():
            whole = model(x).logits
            for cache in (st.make_cache(model), DynamicCache(config=model.config), DynamicCache()):
                pieces = [model(piece, **{CACHE: cache}).logits for piece in x.split(chunk, dim=1)]
                assert_calibrated(torch.cat(pieces, 1), whole, whole)

    @pytest.mark.parametrize("levels", [FLAT, WITHIN, WIDER])
    def test_the_cache_keeps_nothing_beyond_the_window(self, family, levels):
        model = sliding(family)
        st.set_hierarchy(model, levels)
        cache = st.make_cache(model)
        write(model, tokens(), cache=cache)
        length, near = cache.get_seq_length(), levels.within(WINDOW)
        kept = [near, levels if family == "gemma3" else near]  # the last layer of Gemma 3 has no window
        assert cache.key_numbers == 2 * sum(each.key_numbers(length) for each in kept)
        assert cache.value_numbers == 2 * sum(each.value_numbers(length, HEAD) for each in kept)

    def test_blocks_need_sequences_within_the_window(self, family):
        model, x = sliding(family), tokens(length=WINDOW + 1)
        st.set_hierarchy(model, BLOCKS)
        model(x[:, :WINDOW])
        message = (
            f"layers.0.self_attn has a window of {WINDOW} tokens, in which levels by block .* use levels by window"
        )
        with pytest.raises(ValueError, match=message):
            model(x)
        for cache in (st.make_cache(model), DynamicCache(config=model.config), DynamicCache()):
            with torch.no_grad():
                model(x[:, :WINDOW], **{CACHE: cache})
                with pytest.raises(ValueError, match=message):
                    model(x[:, WINDOW:], **{CACHE: cache})

    def test_packed_sequences(self, family):
        model = sliding(family)
        st.set_hierarchy(model, FLAT)
        positions = torch.cat([torch.arange(10), torch.arange(11)])[None].expand(2, -1)
        with pytest.raises(ValueError, match="several sequences packed"):
            model(tokens(), position_ids=positions, use_cache=False)

    def test_files_bring_it_back(self, family, tmp_path):
        model, given = sliding(family), inputs(family, "left")
        st.set_hierarchy(model, WIDER)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="structattn_mlr").eval()
        assert torch.equal(real_logits(loaded, given), real_logits(model, given))


class TestSinks:
    """Sinks are seen beyond a native window."""

    LEVELS = Hierarchy.parse("2|2|4v4|1|3@w*|12|4+3")

    def test_they_are_added_to_the_window(self):
        model, given = sliding("mistral", dtype=torch.float64), inputs("mistral", "left")
        whole = make("mistral", dtype=torch.float64)
        st.set_hierarchy(model, self.LEVELS)
        st.set_hierarchy(whole, self.LEVELS.within(WINDOW))
        expected = real_logits(whole, given).detach()
        assert_calibrated(real_logits(model, given).detach(), expected, expected)

    def test_tokens_are_those_of_a_full_recompute(self):
        model, x, real = sliding("mistral"), tokens(), mask("left")
        st.set_hierarchy(model, self.LEVELS)
        expected = write(model, x, real, cache=False)
        assert torch.equal(write(model, x, real, st.make_cache(model)), expected)
        assert torch.equal(write(model, x, real, st.make_cache(model), prefill_chunk_size=4), expected)

    def test_caches_of_transformers_may_have_dropped_them(self):
        model = sliding("mistral")
        st.set_hierarchy(model, self.LEVELS)
        with pytest.raises(ValueError, match=r"has sinks and a native window of 9 tokens.*use make_cache\(model\)"):
            write(model, tokens())

    def test_they_lie_within_the_window(self):
        model = sliding("mistral", sliding_window=3)
        with pytest.raises(ValueError, match=r"sinks must be below the native window of 3 tokens at .*, got 3"):
            st.set_hierarchy(model, self.LEVELS)


def test_a_window_of_one_token():
    model = sliding("mistral", sliding_window=1, dtype=torch.float64)
    expected = model(tokens()).logits
    st.set_hierarchy(model, WIDER)
    assert_calibrated(model(tokens()).logits.detach(), expected.detach(), expected.detach())


def test_a_cache_made_for_another_window():
    model = sliding("mistral")
    st.set_hierarchy(model, FLAT)
    cache = st.make_cache(model)
    model.config.sliding_window = None
    with pytest.raises(ValueError, match="cache was made for a window of 9 tokens, and the layer has one of None"):
        write(model, tokens(), cache=cache)
    model.config.sliding_window = 5
    cache.reset()
    with pytest.raises(ValueError, match="cache was made for a window of 9 tokens, and the layer has one of 5"):
        write(model, tokens(), cache=cache)


def test_a_static_cache():
    model = sliding("mistral")
    st.set_hierarchy(model, FLAT)
    whole, cache = model(tokens()).logits, StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        pieces = [model(piece, **{CACHE: cache}).logits for piece in tokens().split([14, 1, 5, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    cache.reset()
    with pytest.raises(ValueError, match="static"), torch.no_grad():
        model(tokens(length=WINDOW - 1), **{CACHE: cache})


class TestMasks:
    """`mlr_mask` called as transformers calls it."""

    @staticmethod
    def masked(function, local, queries, keys, first_key=0, **options):
        given = {"batch_size": 2, "q_length": queries, "kv_length": keys, "kv_offset": first_key}
        offset = first_key + keys - queries
        return mlr_mask(**given, q_offset=offset, mask_function=function, local_size=local, **options)

    @pytest.mark.parametrize(("queries", "keys", "first_key"), [(21, 21, 0), (1, 21, 0), (5, 21, 0), (4, 8, 13)])
    def test_a_sliding_window_is_the_third_axis(self, queries, keys, first_key):
        function = sliding_window_causal_mask_function(5)
        assert self.masked(function, 5, queries, keys, first_key).shape == (2, 0, 5)
        real = torch.ones(2, keys + first_key, dtype=torch.bool)
        assert self.masked(function, 5, queries, keys, first_key, attention_mask=real).shape == (2, 0, 5)
        real[1, :15] = False
        window = self.masked(function, 5, queries, keys, first_key, attention_mask=real)
        assert window.shape == (2, keys, 5)
        assert torch.equal(window[:, :, 0], real[:, first_key:])

    def test_a_window_that_hides_nothing(self):
        assert self.masked(sliding_window_causal_mask_function(21), 21, 21, 21) is None

    @pytest.mark.parametrize(("queries", "keys"), [(21, 21), (1, 6), (2, 11)])
    def test_chunks(self, queries, keys):
        function = chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"causal masks and sliding windows alone.*chunks"):
            self.masked(function, 5, queries, keys)

    def test_a_window_of_another_size(self):
        with pytest.raises(ValueError, match="causal masks and sliding windows alone"):
            self.masked(sliding_window_causal_mask_function(6), 5, 21, 21)

    def test_keys_dropped_without_a_window(self):
        dropped = self.masked(causal_mask_function, None, 4, 8, 13)
        assert dropped.shape == (2, 0, 0)
        for window in (None, 5):
            with pytest.raises(ValueError, match="got 0 in the mask"):
                split_window(dropped, window, 8)

    def test_a_window_in_the_layer_alone(self):
        assert split_window(None, 8, 8) == (None, None)
        with pytest.raises(ValueError, match="got None in the mask and 7 from the layer, which passes 8 keys"):
            split_window(None, 7, 8)
