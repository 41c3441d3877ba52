"""Generation with the compressed cache: the tokens of a full recompute, or an error."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.integrations.transformers import attention as attention_module
from structattn.models.transformers_internals import CACHE, set_attention_implementation
from tests.integrations import dense
from tests.integrations.families import DECODERS, FAMILIES, HEAD, ROTARY, make, mask, tokens
from tests.tolerance import assert_calibrated

LEVELS = Hierarchy((2, 2, 4), (None, 12, 6))
NEAR = Hierarchy.parse("2|2|4v4|0|4@w9|4/1|0.7|0.4")
SLIDING = Hierarchy.parse("4|4v2|6@w17|5")
NEW = 22  # from 21 tokens on (1 with T5), over edges of both blocks
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 4, "no_repeat_ngram_size": 0},
}


def write(model, x, real=None, cache=None, **options):
    """Return the tokens that `generate` appends; with `cache=False` by full recompute."""
    torch.manual_seed(11)
    kept = {"use_cache": False} if cache is False else {CACHE: cache}
    # Models of random weights repeat themselves unless repetition is banned.
    options = {"max_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 2} | options
    attention_mask = torch.ones_like(x) if real is None else real
    written = model.generate(x, attention_mask=attention_mask, **kept, **options)
    return written if model.config.is_encoder_decoder else written[:, x.shape[1] :]


def repetitive(length=21):
    """Return a prompt that repeats itself: prompt lookup proposes candidates, of which some are accepted."""
    return tokens(1, 5).repeat(1, 5)[:, :length]


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize(
        ("mode", "padding", "levels"),
        [
            *itertools.product(("greedy", "beam", "sampling"), ("none", "left"), (LEVELS,)),
            ("greedy", "left", NEAR),
            ("beam", "left", SLIDING),
            ("sampling", "none", NEAR),
        ],
    )
    def test_tokens_are_those_of_a_full_recompute(self, family, mode, padding, levels):
        model, x, real = make(family), tokens(), mask(padding)
        st.set_hierarchy(model, levels)
        expected = write(model, x, real, cache=False, **MODES[mode])
        assert torch.equal(write(model, x, real, st.make_cache(model), **MODES[mode]), expected)
        assert torch.equal(write(model, x, real, **MODES[mode]), expected)  # the cache of transformers
        assert len(expected[0].unique()) > 4

    @pytest.mark.parametrize("levels", [LEVELS, SLIDING])
    def test_prompt_lookup(self, family, levels, monkeypatch):
        model, x = make(family), repetitive()
        st.set_hierarchy(model, levels)
        expected = write(model, x, cache=False, no_repeat_ngram_size=0)
        cache, cropped = st.make_cache(model), []
        crop = cache.crop
        monkeypatch.setattr(cache, "crop", lambda count: cropped.append(count) or crop(count))
        assert torch.equal(write(model, x, cache=cache, **MODES["lookup"]), expected)
        assert min(cropped) < 0

    @pytest.mark.parametrize("levels", [LEVELS, NEAR])
    def test_greedy_tokens_are_those_of_the_formula(self, family, levels):
        model, x, real = make(family), tokens(), mask("left")
        modules = dense.self_attention(model)
        st.set_hierarchy(model, levels)
        written = write(model, x, real, st.make_cache(model))
        dense.install(model, {stack: [levels] * len(layers) for stack, layers in modules.items()})
        assert torch.equal(write(model, x, real, cache=False), written)
        set_attention_implementation(model, "sdpa")
        assert not torch.equal(write(model, x, real), written)

    def test_one_level_writes_what_the_model_writes(self, family):
        model, x, real = make(family), tokens(), mask("left")
        expected = write(model, x, real)
        st.set_hierarchy(model, Hierarchy.flat(HEAD))
        assert torch.equal(write(model, x, real, st.make_cache(model)), expected)

    @pytest.mark.parametrize("levels", [LEVELS, NEAR, SLIDING])
    def test_the_cache_holds_the_numbers_of_the_levels(self, family, levels):
        model = make(family)
        st.set_hierarchy(model, [levels, Hierarchy.flat(HEAD)] if family != "t5" else levels)
        cache = st.make_cache(model)
        write(model, tokens(), cache=cache)
        mine = cache.self_attention_cache if family == "t5" else cache
        length = cache.get_seq_length()
        assert length == (NEW if family == "t5" else 21 + NEW - 1)
        layers = [levels, levels if family == "t5" else Hierarchy.flat(HEAD)]
        heads = 2 if family in ROTARY else 4
        assert mine.key_numbers == heads * sum(hierarchy.key_numbers(length) for hierarchy in layers)
        assert mine.value_numbers == heads * sum(hierarchy.value_numbers(length, HEAD) for hierarchy in layers)
        assert mine.key_numbers < 2 * heads * HEAD * length
        assert mine.nbytes > mine.key_bytes >= 4 * 2 * mine.key_numbers


def test_bytes_at_long_contexts():
    """At most 28% of a standard cache at 16,384 tokens; but for spare room a line with the slope of level 1."""
    model = make("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    levels = Hierarchy.parse("16|16|32v@w512|128")
    st.set_hierarchy(model, levels)
    cache, chunk = st.make_cache(model), torch.randn(1, 1, 2048, 64)
    for length in range(2048, 100_000, 2048):
        cache.update(chunk, chunk, 0)
        cache.stores[0].forget()
        live = 4 * (32 * length + 32 * 512 + 64 * 128)
        assert 4 * levels.cache_numbers(length) == 4 * (cache.key_numbers + cache.value_numbers) == live
        assert live <= cache.nbytes <= live * (1 + 1 / 32) + 4 * 128 * 128
        assert length != 16_384 or cache.nbytes <= 0.28 * 4 * 128 * length


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("levels", "order"), [(LEVELS, "as_trained"), (LEVELS, "by head"), (NEAR, "by head")])
def test_logits_from_the_cache_are_those_of_a_full_recompute(family, levels, order):
    """Token by token and in chunks, over every edge, in float64; a permutation for each key head included."""
    model, x = make(family, dtype=torch.float64), tokens(length=40)
    heads, units = (4, HEAD) if family == "gpt2" else (2, HEAD // 2)
    orders = [[torch.randperm(units).tolist() for _ in range(heads)] for _ in range(2)]
    st.set_hierarchy(model, levels, order="as_trained" if order == "as_trained" else orders)
    with torch.no_grad():
        whole = model(x).logits
        for chunk in (1, 7, 23):
            cache = st.make_cache(model)
            pieces = [model(piece, **{CACHE: cache}).logits for piece in x.split(chunk, dim=1)]
            assert_calibrated(torch.cat(pieces, 1), whole, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("levels", [LEVELS, NEAR])
def test_under_autocast(family, levels):
    """Logits from the cache err at most twice as much as those without one."""
    model, x = make(family), tokens(length=30)
    st.set_hierarchy(model, levels)
    given = {"encoder_outputs": (torch.randn(2, 9, 32),)} if family == "t5" else {}
    name, cache = "decoder_input_ids" if family == "t5" else "input_ids", st.make_cache(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(**given, **{name: x}).logits
        pieces = [model(**given, **{name: piece}, **{CACHE: cache}).logits for piece in x.split([20, 1, 9], 1)]
    part = torch.cat(pieces, 1)
    assert part.dtype == whole.dtype == torch.bfloat16
    given = {"encoder_outputs": (given["encoder_outputs"][0].double(),)} if given else {}
    with torch.no_grad():
        exact = model.double()(**given, **{name: x}).logits
    assert_calibrated(part, exact, whole)


@pytest.mark.parametrize("levels", [LEVELS, NEAR, SLIDING])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_a_left_padded_prompt_is_read_in_chunks(chunk, levels):
    """The first chunks of some rows are padding alone."""
    model, x, real = make("llama"), tokens(), mask("left")
    st.set_hierarchy(model, levels)
    expected = write(model, x, real, cache=False)
    assert torch.equal(write(model, x, real, st.make_cache(model), prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("levels", [LEVELS, NEAR, SLIDING])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("amount", [1, 8, 40])
def test_left_padding_by_any_amount_changes_nothing(family, levels, amount):
    """A row among longer ones gives the logits that it gives alone, in one call and from either cache."""
    model, x = make(family, dtype=torch.float64), tokens(1, 30)
    st.set_hierarchy(model, levels)
    padded = torch.cat([tokens(1, amount, seed=4), x], dim=1).repeat(2, 1)
    real = torch.ones_like(padded)
    real[0, :amount] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(x).logits[0]
        for cache in (None, st.make_cache(model), DynamicCache()):
            pieces = []
            for piece in torch.arange(30 + amount).split(30 + amount if cache is None else 11):
                given = {"attention_mask": real[:, : piece[-1] + 1], "position_ids": positions[:, piece], CACHE: cache}
                pieces.append(model(padded[:, piece], **given, use_cache=cache is not None).logits[0])
            assert_calibrated(torch.cat(pieces)[amount:], alone, alone)


@pytest.mark.parametrize("levels", [LEVELS, NEAR])
def test_an_assistant_proposes_tokens(levels):
    model, assistant, x = make("llama"), make("llama", seed=1, num_hidden_layers=1), tokens(1)
    for each in (model, assistant):
        st.set_hierarchy(each, levels)
    expected = write(model, x, cache=False, no_repeat_ngram_size=0)
    for cache in (st.make_cache(model), None):
        given = {"assistant_model": assistant, "no_repeat_ngram_size": 0}
        assert torch.equal(write(model, x, cache=cache, **given), expected)


def test_a_standard_cache_is_named_once(caplog):
    attention_module._log_standard_cache.cache_clear()
    model, x = make("llama"), tokens()
    st.set_hierarchy(model, NEAR)
    write(model, x, cache=st.make_cache(model))
    assert not caplog.records
    write(model, x)
    write(model, x)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not compressed" in record.getMessage()
    assert "make_cache(model)" in record.getMessage()


def test_a_prompt_is_read_once_for_several_continuations():
    """A copied cache grows, and the original stays as it was."""
    model, x = make("llama"), tokens(length=30)
    st.set_hierarchy(model, LEVELS)
    prompt = st.make_cache(model)
    with torch.no_grad():
        model(x[:, :20], **{CACHE: prompt})
    for _ in range(2):
        assert torch.equal(write(model, x, cache=copy.deepcopy(prompt)), write(model, x, cache=False))
    assert prompt.get_seq_length() == 20


class TestSinks:
    """Layers that see everything, a window with sinks, and levels with sinks, in one model."""

    MIXED = ("8", "8v@w16+4", "2|2|4v4|0|4@w9|6+3/1|0.7|0.4")

    def mixed(self, **fields):
        model = make("llama", num_hidden_layers=3, **fields)
        st.set_hierarchy(model, self.MIXED)
        return model

    @pytest.mark.parametrize(("mode", "padding"), [("greedy", "left"), ("beam", "left"), ("sampling", "none")])
    def test_tokens_are_those_of_a_full_recompute(self, mode, padding):
        model, x, real = self.mixed(), tokens(), mask(padding)
        expected = write(model, x, real, cache=False, **MODES[mode])
        for options in ({}, {"prefill_chunk_size": 3}):
            given = MODES[mode] | options
            assert torch.equal(write(model, x, real, st.make_cache(model), **given), expected)
        assert torch.equal(write(model, x, real, **MODES[mode]), expected)  # the cache of transformers

    def test_tokens_are_those_of_the_formula(self):
        model, x, real = self.mixed(), tokens(), mask("left")
        written = write(model, x, real, st.make_cache(model))
        dense.install(model, {"decoder": [Hierarchy.parse(text) for text in self.MIXED]})
        assert torch.equal(write(model, x, real, cache=False), written)
        without = [Hierarchy.parse(text).without_sinks() for text in self.MIXED]
        st.set_hierarchy(model, without)
        assert not torch.equal(write(model, x, real, st.make_cache(model)), written)

    def test_tokens_are_taken_back(self):
        model, x = self.mixed(), repetitive()
        expected = write(model, x, cache=False, no_repeat_ngram_size=0)
        assert torch.equal(write(model, x, cache=st.make_cache(model), **MODES["lookup"]), expected)

    @pytest.mark.parametrize("chunk", [1, 18])
    def test_left_padding_changes_nothing(self, chunk):
        model, x, amount = self.mixed(dtype=torch.float64), tokens(1, 40), 11
        padded = torch.cat([tokens(1, amount, seed=4), x], dim=1).repeat(2, 1)
        real = torch.ones_like(padded)
        real[0, :amount] = 0
        positions = (real.cumsum(1) - 1).clamp(min=0)
        cache, pieces = st.make_cache(model), []
        with torch.no_grad():
            alone = model(x).logits[0]
            for piece in torch.arange(40 + amount).split(chunk):
                given = {"attention_mask": real[:, : piece[-1] + 1], "position_ids": positions[:, piece], CACHE: cache}
                pieces.append(model(padded[:, piece], **given).logits[0])
        assert_calibrated(torch.cat(pieces)[amount:], alone, alone)

    def test_the_cache_holds_the_numbers_of_the_levels(self):
        model = self.mixed()
        cache = st.make_cache(model)
        write(model, tokens(), cache=cache)
        layers, length = [Hierarchy.parse(text) for text in self.MIXED], cache.get_seq_length()
        assert cache.key_numbers == 2 * sum(hierarchy.key_numbers(length) for hierarchy in layers)
        assert cache.value_numbers == 2 * sum(hierarchy.value_numbers(length, HEAD) for hierarchy in layers)

    def test_files_bring_them_back(self, tmp_path):
        model = self.mixed()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="structattn_mlr").eval()
        assert st.get_hierarchy(loaded) == {"decoder": [Hierarchy.parse(text) for text in self.MIXED]}
        assert torch.equal(write(loaded, tokens(), cache=st.make_cache(loaded)), write(model, tokens(), cache=False))


def read(model, cache, rows=2):
    with torch.no_grad():
        return model(tokens(rows, 13), **{CACHE: cache})


class TestACacheThatDoesNotFit:
    @pytest.fixture
    def model(self):
        model = make("llama")
        st.set_hierarchy(model, LEVELS)
        return model

    def test_made_for_another_model(self, model):
        other = make("llama")
        st.set_hierarchy(other, LEVELS)
        with pytest.raises(ValueError, match="another model"):
            read(model, st.make_cache(other))

    def test_made_for_a_copy(self, model):
        with pytest.raises(ValueError, match="another model"):
            read(copy.deepcopy(model), st.make_cache(model))

    @pytest.mark.parametrize("hierarchy", ["4|2|2@24", str(LEVELS)])
    def test_made_before_the_hierarchy_was_set_anew(self, model, hierarchy):
        cache = st.make_cache(model)
        read(model, cache)
        st.set_hierarchy(model, hierarchy)
        with pytest.raises(ValueError, match="set anew"):
            read(model, cache)

    def test_filled_before_the_parameters_changed(self, model):
        cache = st.make_cache(model)
        read(model, cache)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        with pytest.raises(ValueError, match="parameters changed"):
            read(model, cache)
        cache.reset()
        read(model, cache)

    def test_filled_with_other_rows(self, model):
        cache = st.make_cache(model)
        read(model, cache)
        with pytest.raises(ValueError, match="2 rows"):
            read(model, cache, rows=3)

    def test_under_another_implementation(self, model):
        cache = st.make_cache(model)
        set_attention_implementation(model, "sdpa")
        with pytest.raises(ValueError, match="only 'structattn_mlr' reads"):
            read(model, cache)
        with pytest.raises(ValueError, match="'structattn_mlr', got 'sdpa'"):
            st.make_cache(model)

    def test_with_gradients(self, model):
        with pytest.raises(ValueError, match="no gradients"):
            model(tokens(), **{CACHE: st.make_cache(model)})

    def test_padding_on_the_right(self, model):
        with pytest.raises(ValueError, match="pad on the left"), torch.no_grad():
            model(tokens(), attention_mask=mask("right"), **{CACHE: st.make_cache(model)})

    @pytest.mark.parametrize("levels", [LEVELS, NEAR])
    def test_crop_past_what_is_kept(self, model, levels):
        st.set_hierarchy(model, levels)
        cache = st.make_cache(model)
        read(model, cache)
        with pytest.raises(ValueError, match="cannot crop 13 tokens to 10"):
            cache.crop(-3)

    def test_static(self, model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="static"):
            read(model, cache)


def test_caches_of_transformers_serve_the_decoder_of_t5():
    model = make("t5")
    st.set_hierarchy(model, LEVELS)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(write(model, tokens(), cache=cache), write(model, tokens(), cache=False))


def test_a_model_without_a_decoder_has_no_cache():
    encoder = make("t5").encoder
    st.set_hierarchy(encoder, LEVELS)
    with pytest.raises(ValueError, match="no causal self-attention"):
        st.make_cache(encoder)
