"""Private names of transformers: with each gone, results stay right or the reason is said."""

import pytest
import torch
from transformers import GenerationMixin

from structattn.models import ModelCache, transformers_internals
from structattn.models.transformers_internals import CACHE, attention_implementation, set_attention_implementation
from tests.models.test_language import small, tokens, woken

GREEDY = {"max_new_tokens": 9, "do_sample": False}


def test_without_the_hook_for_caches_nothing_is_cached(monkeypatch):
    model, x = woken(small(attention="mlr:4,2,2", positions="rotary")), tokens(1, 10)
    expected = model.generate(x, **GREEDY)
    made = []
    monkeypatch.setattr("structattn.models.language_model.ModelCache", lambda *_: made.append(1))
    monkeypatch.delattr(GenerationMixin, "_prepare_cache_for_generation")
    assert not transformers_internals.prepares_cache()
    assert torch.equal(model.generate(x, **GREEDY), expected)
    assert not made


def test_without_the_hook_a_given_cache_serves(monkeypatch):
    model, x = woken(small(attention="mlr:4,2,2", positions="rotary")), tokens(1, 10)
    expected, cache = model.generate(x, **GREEDY), ModelCache(model)
    monkeypatch.delattr(GenerationMixin, "_prepare_cache_for_generation")
    assert torch.equal(model.generate(x, **GREEDY, cache=cache), expected)
    assert cache.get_seq_length() == 18


def test_a_mark_that_nobody_reads_does_no_harm():
    """`generate` reads the mark where it knows it; a cache takes any."""
    model = woken(small(positions="rotary"))
    cache = ModelCache(model)
    transformers_internals.mark_as_given(cache)
    assert cache._is_user_defined


def test_an_implementation_that_cannot_be_known_is_an_error():
    """Nothing else tells whether a model runs standard attention or levels."""

    class Config:
        pass

    with pytest.raises(RuntimeError, match=r"does not say which attention a model has .*structattn info"):
        attention_implementation(Config())


def test_every_model_within_a_model_is_set():
    """By transformers 5.17 the stacks of T5, whose configs are copies, are passed by."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=16, d_ff=16)
    model = T5ForConditionalGeneration(config)
    for name in ("eager", "sdpa"):
        set_attention_implementation(model, name)
        parts = (model, model.encoder, model.decoder)
        assert {attention_implementation(part.config) for part in parts} == {name}


def test_the_name_of_the_cache_is_that_of_outputs():
    model = woken(small(positions="rotary"))
    with torch.no_grad():
        assert isinstance(model(tokens(1, 3), use_cache=True)[CACHE], ModelCache)
