"""Generation by the project's models: the cache gives what reading every token anew gives, however one decodes."""

import copy

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from structattn.models import ModelCache
from structattn.models.transformers_internals import CACHE
from tests.models.test_language import STRUCTURES, WINDOWS, small, tokens, woken
from tests.tolerance import assert_calibrated

GREEDY = {"max_new_tokens": 30, "do_sample": False}
LEVELS = ["mlr:4,2,2", WINDOWS, "swa:4"]
POSITIONS = {"learned": {"context_length": 64}, "rotary": {"positions": "rotary"}}


def model_of(attention, positions="rotary"):
    """Rotary models have blocks of 8 and less for MLR attention, which halves their context of 16 tokens."""
    return woken(small(**POSITIONS[positions], attention=attention))


@torch.no_grad()
def assert_calibrated_logits(logits, model, x):
    """Check logits that a cache gives against float64, by the error of one call of the model."""
    whole = model(x).logits
    if model.config.attention.startswith("bmlr"):
        # A norm over two features amplifies single roundings by chance: the error of one call says little.
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
        return
    exact = copy.deepcopy(model).double()(x).logits.double()
    assert_calibrated(logits, exact, whole, "logits")


def step_by_step(model, x, prompt, chunk, mask=None):
    """Logits `(B, T - prompt + …, V)` of every token, the prompt in chunks, then token by token."""
    cache, parts, read = ModelCache(model), [], 0
    with torch.no_grad():
        while read < x.shape[1]:
            end = min(read + chunk, prompt) if read < prompt else read + 1
            part_mask = None if mask is None else mask[:, :end]
            parts.append(model(x[:, read:end], attention_mask=part_mask, cache=cache).logits)
            read = end
    assert cache.get_seq_length() == x.shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", STRUCTURES)
def test_logits_of_every_step(attention, positions):
    model, x = model_of(attention, positions), tokens(2, 60)
    for prompt, chunk in [(1, 1), (37, 37), (37, 5), (23, 1)]:
        assert_calibrated_logits(step_by_step(model, x, prompt, chunk), model, x)


@pytest.mark.parametrize("attention", LEVELS)
@pytest.mark.parametrize("prompt", [1, 2, 15, 16, 17, 63, 64, 65, 200, 300])
@pytest.mark.parametrize("chunk", [1, 5, 64, 300])
def test_prompts_of_any_length(prompt, chunk, attention):
    """Also beyond the context of 16."""
    model, x = model_of(attention), tokens(1, prompt + 9)
    assert_calibrated_logits(step_by_step(model, x, prompt, chunk), model, x)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", STRUCTURES)
def test_left_padding_gives_each_row_what_it_gives_alone(attention, positions):
    model, x = model_of(attention, positions), tokens(3, 50)
    mask = torch.ones_like(x)
    for row, start in enumerate([0, 5, 30]):
        mask[row, :start] = 0
    logits = step_by_step(model, x, 33, 8, mask)
    for row, start in enumerate([0, 5, 30]):
        assert_calibrated_logits(logits[row : row + 1, start:], model, x[row : row + 1, start:])


DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("attention", ["standard", *LEVELS, "btt"])
@pytest.mark.parametrize("how", DECODING.values(), ids=DECODING)
def test_generate_with_and_without_the_cache(attention, how):
    model, x = model_of(attention), tokens(1 if "prompt_lookup_num_tokens" in how else 2, 13)
    x[:, 7:] = x[:, 1:7]  # a repetition, for the lookup to find
    outputs = []
    for options in (how, {name: value for name, value in how.items() if name != "prompt_lookup_num_tokens"}):
        torch.manual_seed(0)
        outputs.append(model.generate(x, **GREEDY | options, use_cache=options is how))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("attention", LEVELS)
@pytest.mark.parametrize("padding", [1, 9, 40])
@torch.no_grad()
def test_left_padding_by_any_amount_changes_nothing(attention, padding):
    """In the logits of a chunked prompt and of what is written after it."""
    model, x = model_of(attention), tokens(1, 50)
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(1, padding, dtype=torch.long), torch.ones_like(x)], 1)
    logits = step_by_step(model, padded, padding + 30, 20, mask)[:, padding:]
    assert_calibrated_logits(logits, model, x)


@pytest.mark.parametrize("attention", LEVELS)
def test_a_chunk_is_taken_back_and_read_again(attention):
    model, x = model_of(attention), tokens(1, 60)
    cache = ModelCache(model)
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        parts = [model(x[:, :30], cache=cache).logits]
        model(x[:, :22], cache=cache)
        cache.crop(-22)
        parts += [model(part, cache=cache).logits for part in x[:, 30:].split([17, 1, 12], 1)]
    assert_calibrated_logits(torch.cat(parts, 1), model, x)


@pytest.mark.parametrize("attention", LEVELS)
def test_generate_with_left_padding(attention):
    model, x = model_of(attention), tokens(2, 20)
    mask = torch.ones_like(x)
    mask[1, :9] = 0
    together = model.generate(x, attention_mask=mask, **GREEDY)
    alone = model.generate(x[1:, 9:], **GREEDY)
    assert torch.equal(together[1, 9:], alone[0])


@pytest.mark.parametrize("attention", LEVELS)
def test_rotary_models_write_past_the_context(attention):
    model = model_of(attention)
    assert model.generate(tokens(1, 3), max_length=100, do_sample=False).shape == (1, 100)


@pytest.mark.parametrize("attention", LEVELS)
def test_a_cache_goes_on_where_it_was(attention):
    model, x = model_of(attention), tokens(1, 10)
    whole = model.generate(x, **GREEDY)
    first = model.generate(x, **GREEDY | {"max_new_tokens": 12}, return_dict_in_generate=True)
    rest = model.generate(first.sequences, **GREEDY | {"max_new_tokens": 18}, cache=first[CACHE])
    assert torch.equal(rest, whole)
    assert isinstance(first[CACHE], ModelCache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_either_name(name):
    """In every version of transformers, without a warning."""
    model, x = model_of("mlr:4,2,2"), tokens(1, 10)
    expected = model.generate(x, **GREEDY)
    assert torch.equal(model.generate(x, **GREEDY, **{name: ModelCache(model)}), expected)
    assert torch.equal(model.generate(x, **GREEDY, **{name: ModelCache(model)}, prompt_lookup_num_tokens=3), expected)
    given = {name: ModelCache(model)}
    with torch.no_grad():
        first, second = model(x[:, :6], **given).logits, model(x[:, 6:], **given).logits
        assert_calibrated_logits(torch.cat((first, second), 1), model, x)
    inputs = model.prepare_inputs_for_generation(x, **given)
    assert inputs[CACHE] is given[name]
    assert inputs["input_ids"].shape == (1, 0)


def test_two_caches_are_refused():
    model = model_of("mlr:4,2,2")
    both = {"cache": ModelCache(model), "past_key_values": ModelCache(model)}
    for call in (model.forward, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tokens(1, 3), **both)


@pytest.mark.parametrize("attention", LEVELS)
def test_the_cache_holds_what_the_model_states(attention):
    model = model_of(attention)
    with torch.no_grad():
        cache = model(tokens(1, 21), use_cache=True)[CACHE]
    assert cache.key_numbers == model.key_numbers(21)
    assert cache.value_numbers == model.value_numbers(21)
    assert cache.nbytes > cache.key_bytes > 0


def test_streaming(capsys):
    class Letters:
        def decode(self, tokens, **_):
            return "".join(chr(97 + int(token)) for token in tokens)

    model, x = model_of("mlr:4,2,2"), tokens(1, 5)
    out = model.generate(x, **GREEDY, streamer=TextStreamer(Letters()))
    assert capsys.readouterr().out.strip() == Letters().decode(out[0])


class TestBadInput:
    def filled(self, **fields):
        model = model_of("mlr:4,2,2")
        cache = ModelCache(model)
        with torch.no_grad():
            model(tokens(2, 21), cache=cache)
        return model, cache

    def test_parameters_that_changed(self):
        model, cache = self.filled()
        with torch.no_grad():
            model.head.weight.mul_(1.01)
            with pytest.raises(ValueError, match="its parameters changed since"):
                model(tokens(2, 1), cache=cache)

    def test_another_model(self):
        _, cache = self.filled()
        with pytest.raises(ValueError, match="filled by another model"):
            model_of("mlr:4,2,2")(tokens(2, 1), cache=cache)

    def test_another_batch_size(self):
        model, cache = self.filled()
        with pytest.raises(ValueError, match="the 2 rows of the cache, got 3"), torch.no_grad():
            model(tokens(3, 1), cache=cache)

    def test_a_cache_of_transformers(self):
        model = model_of("mlr:4,2,2")
        with pytest.raises(TypeError, match=r"must be a structattn\.models\.ModelCache of this model, got Dynamic"):
            model.generate(tokens(1, 3), cache=DynamicCache(), **GREEDY)

    def test_a_kind_of_cache_by_name(self):
        with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
            model_of("mlr:4,2,2").generate(tokens(1, 3), cache_implementation="static", **GREEDY)

    def test_padding_on_the_right(self):
        model = model_of("mlr:4,2,2")
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        with pytest.raises(ValueError, match="padding on the right in row 1"), torch.no_grad():
            model(tokens(2, 3), attention_mask=mask, use_cache=True)

    def test_past_the_position_table(self):
        model = model_of("mlr", "learned")
        with pytest.raises(ValueError, match="learned position table has 64 rows"):
            model.generate(tokens(1, 60), **GREEDY)

    def test_gradients(self):
        with pytest.raises(ValueError, match="a cache carries no gradients"):
            model_of("mlr:4,2,2")(tokens(1, 3), use_cache=True)
