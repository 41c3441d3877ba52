"""The basis of values, folded into weights: outputs are the same, and far tokens need fewer dimensions."""

import copy

import pytest
import torch

from structattn.integrations import transformers as st
from structattn.integrations.transformers.layers import attention_layers
from structattn.integrations.transformers.statistics import collect_statistics
from tests.integrations.families import DECODERS, HEAD, make, mask, tokens
from tests.tolerance import assert_calibrated


class LastBatch:
    """Keep the last inputs of one layer."""

    def add(self, inputs):
        self.seen = inputs


@pytest.mark.parametrize("family", DECODERS)
def test_the_change_of_basis_alone_leaves_the_logits(family):
    model, x = make(family, dtype=torch.float64), tokens(length=40)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    before = model(x).logits.detach()
    unchanged = copy.deepcopy(model)
    st.balance_values(model, st.far_value_moments(model, [tokens(seed=1), tokens(seed=2)], distance=3))
    assert_calibrated(model(x).logits.detach(), before, before)
    changed = [
        name
        for (name, old), new in zip(unchanged.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert len(changed) >= 2 * len(attention_layers(model)["decoder"])


def test_moments_are_those_of_the_definition():
    """Far-mixed values by explicit softmax, left padding included."""
    model, x = make("llama", dtype=torch.float64), tokens(length=20)
    batch = {"input_ids": x, "attention_mask": mask("left", 2, 20)}
    actual = st.far_value_moments(model, batch, distance=5)["decoder"]
    layers = attention_layers(model)["decoder"]
    keep = {id(layer.module): LastBatch() for layer in layers}
    collect_statistics(model, keep, batch)
    for layer, moments in zip(layers, actual, strict=True):
        inputs = keep[id(layer.module)].seen
        group = inputs.query.shape[1] // inputs.key.shape[1]
        key, value = (each.repeat_interleave(group, dim=1) for each in (inputs.key, inputs.value))
        at = torch.arange(20)
        visible = (at[:, None] >= at) & inputs.real[:, None, None]
        scores = (inputs.query @ key.mT * inputs.scale).masked_fill(~visible, -torch.inf)
        far = scores.softmax(-1).nan_to_num().masked_fill(at[:, None] - at < 5, 0.0)
        counted = inputs.real & ((visible[:, 0] & (at[:, None] - at >= 5)).any(-1))
        mixed = (far @ value).unflatten(1, (-1, group)) * counted[:, None, None, :, None]
        exact = torch.einsum("bhgti,bhgtj->hij", mixed, mixed) / (counted.sum() * group)
        assert_calibrated(moments, exact, exact)


def test_moments_become_diagonal_and_descending():
    """In the new basis, weighted by what the output projection reads, which becomes the identity."""
    model, x = make("llama", dtype=torch.float64), tokens(length=60)
    st.balance_values(model, st.far_value_moments(model, x, distance=4))
    for moments in st.far_value_moments(model, x, distance=4)["decoder"]:
        energy = moments.diagonal(dim1=1, dim2=2)
        assert (energy.diff(dim=-1) <= 1e-6 * energy[:, :1]).all()
        diagonal = torch.diag_embed(energy)
        assert_calibrated(moments, diagonal, diagonal)


def test_truncation_changes_less_than_in_the_trained_basis():
    torch.manual_seed(0)
    model, x = make("llama", dtype=torch.float64), tokens(length=60)
    hierarchy = f"{HEAD // 2}|{HEAD // 2}v@w8"
    before = model(x).logits.detach()

    def error(balanced):
        changed = copy.deepcopy(model)
        if balanced:
            st.balance_values(changed, st.far_value_moments(changed, x, distance=8))
        st.set_hierarchy(changed, hierarchy)
        return float((changed(x).logits.detach() - before).norm())

    assert error(balanced=True) < error(balanced=False)


def test_bad_input_changes_nothing():
    model, x = make("llama"), tokens(length=20)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="distance = 50 apart, got none"):
        st.far_value_moments(model, x, distance=50)
    with pytest.raises(ValueError, match="one for each attention layer"):
        st.balance_values(model, {"decoder": []})
    wrong = [torch.eye(3)[None] for _ in attention_layers(model)["decoder"]]
    with pytest.raises(ValueError, match=r"moments of model.layers.0.self_attn must be"):
        st.balance_values(model, {"decoder": wrong})
    assert all(torch.equal(new, weights[name]) for name, new in model.state_dict().items())
