"""Setting a model's hierarchy: errors, switching implementations, saving and loading."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.models.transformers_internals import CACHE, set_attention_implementation
from tests.integrations.families import FAMILIES, HEAD, inputs, make, real_logits, tokens
from tests.tolerance import assert_calibrated

LEVELS = Hierarchy((4, 2, 2), (None, 8, 4))


def wrong(family, hierarchy, message, error=ValueError, **options):
    model = make(family)
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        st.set_hierarchy(model, hierarchy, **options)
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "structattn_mlr")


def test_ranks_must_sum_to_the_head_width():
    wrong("llama", [LEVELS, "4|2@8"], "head width 8 of model.layers.1.self_attn, got 4|2 = 6")


def test_value_ranks_must_sum_to_the_head_width():
    text = "4|2|2v4|2|4@w9|4"
    wrong("llama", [LEVELS, text], r"value ranks .* head width 8 of model.layers.1.self_attn, got 4\|2\|4 = 10")
    wrong("t5", {"encoder": LEVELS, "decoder": text}, "value ranks must sum to the head width 8 of decoder.block.0")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rotary_pair_is_never_split(family):
    wrong(family, [LEVELS, "4|3|1@8"], "even at model.layers.1.self_attn.*got rank 3 at level 2 of 4|3|1")


def test_without_rotation_ranks_may_be_odd():
    model = make("gpt2")
    st.set_hierarchy(model, "4|3|1@8")
    assert model(tokens()).logits.isfinite().all()


def test_one_hierarchy_per_layer():
    wrong("llama", [LEVELS], r"one entry per layer \(2\), got 1")
    wrong("t5", [LEVELS, LEVELS], "mapping of encoder and decoder")
    wrong("t5", {"decoder": LEVELS}, "must have the keys encoder, decoder, got decoder")
    wrong("t5", {"decoder": LEVELS, "encoder": [LEVELS]}, "hierarchy of the encoder must have one entry per layer")
    wrong("t5", {"decoder": LEVELS, "encoder": "4|2@8"}, "encoder.block.0.layer.0.SelfAttention, got 4|2 = 6")
    wrong("llama", 8, "sequence with one per layer", TypeError)
    wrong("llama", [8, 8], "Hierarchy or its text form", TypeError)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("slow_first", "order must be one of as_trained, fastest_first, slowest_first"),
        ([[0, 1, 2, 3]], "one entry per layer"),
        ([[0, 1, 2, 2], [0, 1, 2, 3]], "model.layers.0.self_attn must hold each of 0 … 3 once for key head 0"),
        ([[[0, 1, 2, 3]] * 3] * 2, "one list for each of 2 key heads, got 3"),
    ],
)
def test_an_order_is_a_permutation(order, message):
    wrong("llama", LEVELS, message, order=order)


def test_an_order_is_of_lists():
    wrong("llama", LEVELS, "lists of integers", TypeError, order=[7, 7])


def test_an_order_by_frequency_needs_a_rotary_embedding():
    wrong("gpt2", LEVELS, "needs one rotary embedding", order="slowest_first")


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_the_implementation_asks_for_a_hierarchy(self, family):
        model = make(family)
        set_attention_implementation(model, "structattn_mlr")
        with pytest.raises(ValueError, match=r"set_hierarchy\(model, hierarchy\)"):
            model(**inputs(family))

    def test_implementations_can_be_switched(self, family):
        model, given = make(family), inputs(family)
        plain = real_logits(model, given)
        st.set_hierarchy(model, LEVELS)
        ours = real_logits(model, given)
        set_attention_implementation(model, "sdpa")
        assert torch.equal(real_logits(model, given), plain)
        set_attention_implementation(model, "structattn_mlr")
        assert torch.equal(real_logits(model, given), ours)

    @pytest.mark.parametrize("hierarchy", ["2|6@12/mean", "2|6v5|3@w21|6/mean"])
    def test_files_bring_it_back(self, family, hierarchy, tmp_path):
        model, given = make(family), inputs(family, "left")
        order = st.measure_order(model, given if family != "t5" else [given], distance=4)
        st.set_hierarchy(model, hierarchy, order=order)
        model.save_pretrained(tmp_path)
        json.loads((tmp_path / "config.json").read_text())
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="structattn_mlr").eval()
        assert torch.equal(real_logits(loaded, given), real_logits(model, given))
        assert st.get_hierarchy(loaded) == st.get_hierarchy(model)
        cache = {CACHE: st.make_cache(loaded)}
        generated = loaded.generate(tokens(), **cache, max_new_tokens=9, do_sample=False)
        assert torch.equal(generated, model.generate(tokens(), use_cache=False, max_new_tokens=9, do_sample=False))


def test_configs_of_version_0_1_load(tmp_path):
    model = make("llama")
    st.set_hierarchy(model, LEVELS)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layer = {"hierarchy": "4|2|2@16", "order": None}
    config["structattn_mlr"] = {"pairing": "halves", "decoder": [layer, layer]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="structattn_mlr").eval()
    assert torch.equal(loaded(tokens()).logits, expected)


def test_a_config_of_another_shape_is_refused(tmp_path):
    model = make("llama")
    st.set_hierarchy(model, LEVELS)
    settings = model.config.structattn_mlr
    model.config.structattn_mlr = {**settings, "decoder": settings["decoder"][:1]}
    with pytest.raises(ValueError, match="has 1 layers of the decoder, none for decoder layer 1"):
        model(tokens())


def own_logits(model, x):
    """Logits of the model's own attention, in float32 and in float64."""
    plain, exact = model(x).logits.detach(), model.double()(x).logits.detach()
    model.float()
    return plain, exact


class TestOtherModels:
    def test_a_family_nobody_named(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Starcoder2Config(**sizes, num_key_value_heads=2, vocab_size=50, sliding_window=16)
        model = Starcoder2ForCausalLM(config).eval()
        plain, exact = own_logits(model, tokens())
        st.set_hierarchy(model, Hierarchy.flat(HEAD))
        assert_calibrated(model(tokens()).logits.detach(), exact, plain)

    def test_a_window_that_a_layer_does_not_pass_to_its_attention(self):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **windows, num_key_value_heads=2, vocab_size=50)).eval()
        st.set_hierarchy(model, Hierarchy.flat(HEAD))
        model(tokens(length=16))
        with pytest.raises(ValueError, match="one sliding window, got 16 in the mask and None from the layer"):
            model(tokens(length=17))

    def test_scores_that_are_capped(self):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=50))
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn caps its scores at 50.0 .*softcapping"):
            st.set_hierarchy(model, Hierarchy.flat(HEAD))
        assert not hasattr(model.config, "structattn_mlr")

    def test_heads_that_are_rotated_in_part(self):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = GPTNeoXConfig(
            **sizes,
            vocab_size=50,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
        model = GPTNeoXForCausalLM(config).eval()
        plain, exact = own_logits(model, tokens())
        with pytest.raises(ValueError, match="width 8, of which the rotary embedding rotates 4"):
            st.set_hierarchy(model, LEVELS)
        st.set_hierarchy(model, Hierarchy.flat(HEAD))
        assert_calibrated(model(tokens()).logits.detach(), exact, plain)

    def test_no_attention_at_all(self):
        with pytest.raises(ValueError, match="no self-attention that MLR attention can serve"):
            st.set_hierarchy(torch.nn.Linear(3, 3), LEVELS)


def test_importing_integrations_is_light():
    program = "import sys, structattn.integrations; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
