"""The balanced basis folded into a model's weights: outputs are the same, and truncation changes less."""

import copy

import pytest
import torch

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.integrations.transformers.statistics import collect_statistics
from structattn.layers.head_basis import Moments
from tests.integrations.families import HEAD, make, mask, tokens
from tests.tolerance import assert_calibrated


def gpt2(**fields):
    """Return a model in float64 with random biases; a fresh model's are zero."""
    model = make("gpt2", dtype=torch.float64, **fields)
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


class LastBatch:
    """Keep the last batch of one layer's queries and keys."""

    def add(self, inputs):
        self.seen = inputs


@pytest.mark.parametrize("distance", [None, 1])
def test_the_change_of_basis_alone_leaves_the_logits(distance):
    model, x = gpt2(), tokens(length=40)
    before, weight = model(x).logits.detach(), model.transformer.h[1].attn.c_attn.weight.clone()
    st.balance(model, st.far_moments(model, [tokens(seed=1), tokens(seed=2)], distance=distance))
    assert_calibrated(model(x).logits.detach(), before, before)
    changed = (model.transformer.h[1].attn.c_attn.weight - weight).abs().amax(0).unflatten(0, (3, -1))
    assert (changed[:2] > 1e-3).all()
    assert (changed[2] == 0).all()  # values stay


def test_in_float32():
    model, x = gpt2(), tokens(length=40)
    exact = model(x).logits.detach()
    plain = model.float()(x).logits.detach()
    st.balance(model, st.far_moments(model, x))
    assert_calibrated(model(x).logits.detach(), exact, plain)


def test_moments_become_equal_diagonal_and_descending():
    model, x = gpt2(), tokens(length=40)
    st.balance(model, st.far_moments(model, x))
    for moments in st.far_moments(model, x)["decoder"]:
        sigma = moments.query.diagonal(dim1=1, dim2=2)
        assert (sigma.diff(dim=-1) <= 0).all()
        diagonal, zero = torch.diag_embed(sigma), torch.zeros_like(moments.mean)
        for actual, exact in ((moments.query, diagonal), (moments.key, diagonal), (moments.mean, zero)):
            assert_calibrated(actual, exact, exact)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_moments_count_pairs_of_real_tokens_far_apart(family, padding):
    """Compare with a sum over every such pair."""
    model, distance, real = make(family, dtype=torch.float64), 4, mask(padding)
    given = {"input_ids": tokens()} | ({} if real is None else {"attention_mask": real})
    if family == "t5":
        model = model.encoder
    stack = "encoder" if family == "t5" else "decoder"
    kept = {id(layer.module): LastBatch() for layer in st.layers.attention_layers(model)[stack]}
    collect_statistics(model, kept, given)
    moments = st.far_moments(model, given, distance=distance)[stack][1]
    query, key, _, shown, causal, _ = list(kept.values())[1].seen
    assert causal == (family == "gpt2")
    queries, keys = [], []
    for row in range(2):
        for i in range(21):
            for j in range(21):
                if (i - j if causal else abs(i - j)) >= distance and shown[row, i] and shown[row, j]:
                    queries.append(query[row, 2, i])
                    keys.append(key[row, 2, j])
    queries, keys = torch.stack(queries), torch.stack(keys)
    torch.testing.assert_close(moments.query[2], queries.T @ queries / len(queries))
    torch.testing.assert_close(moments.mean[2], keys.mean(0))
    torch.testing.assert_close(moments.key[2], (keys.T @ keys) / len(keys) - keys.mean(0)[:, None] * keys.mean(0))


def test_truncation_changes_less_in_the_new_basis():
    model, x = gpt2(), tokens(8, 64)
    moments, levels = st.far_moments(model, x), Hierarchy.dyadic((3, 2, 3), 64)
    errors = []
    for order in (None, moments):
        fitted = copy.deepcopy(model)
        if order is not None:
            st.balance(fitted, order)
        st.set_hierarchy(fitted, levels)
        errors.append((fitted(x).logits - model(x).logits).square().mean())
    assert 0 < errors[1] < 0.5 * errors[0]


class TestBadInput:
    def test_rotary(self):
        model = make("llama")
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn has a rotary embedding"):
            st.balance(model, st.far_moments(model, tokens()))

    def test_another_projection(self):
        model = make("t5")
        given = {"input_ids": tokens(), "decoder_input_ids": tokens()}
        with pytest.raises(ValueError, match="does not project queries, keys and values by one `c_attn`"):
            st.balance(model, st.far_moments(model, given))

    def test_moments_of_another_model(self):
        model, other = make("gpt2"), make("gpt2", n_layer=1)
        with pytest.raises(ValueError, match="moments must be of this model"):
            st.balance(model, st.far_moments(other, tokens()))
        eye = torch.eye(HEAD).double().repeat(2, 1, 1)
        with pytest.raises(ValueError, match=r"moments of transformer.h.0.attn must be \(4, 8, 8\), got \(2, 8, 8\)"):
            st.balance(model, {"decoder": [Moments(eye, eye, eye[:, 0])] * 2})

    def test_no_far_tokens(self):
        with pytest.raises(ValueError, match="far enough apart; got none"):
            st.far_moments(make("gpt2"), tokens(), distance=21)
        with pytest.raises(ValueError, match="distance must be a positive integer"):
            st.far_moments(make("gpt2"), tokens(), distance=0)


def test_the_old_name_of_far_moments_warns():
    with pytest.warns(DeprecationWarning, match=r"transformers\.measure_moments is now .*\.far_moments"):
        assert st.measure_moments is st.far_moments
    assert "measure_moments" not in st.__all__
    with pytest.raises(AttributeError, match="has no attribute 'far_moment'"):
        _ = st.far_moment
