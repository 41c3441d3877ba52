"""The order in which levels take the dimensions of a head, and measuring it."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.integrations.transformers.pairs import find_pairing, unit_dimensions
from structattn.models.transformers_internals import set_attention_implementation
from tests.integrations.dense import self_attention
from tests.integrations.families import FAMILIES, HEAD, ROTARY, inputs, make, tokens

LEVELS = Hierarchy((4, 2, 2), (None, 8, 4))
SPY = "spy_of_the_tests"
seen = {}


def spy(module, query, key, value, attention_mask, **kwargs):
    seen[id(module)] = (query.detach(), key.detach())
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(SPY, spy)
AttentionMaskInterface.register(SPY, sdpa_mask)


def brute_force(query, key, real, units, distance, causal):
    """Return `(Hkv, units)` by a loop over every pair of tokens."""
    group = query.shape[1] // key.shape[1]
    energy, pairs = torch.zeros(key.shape[1], len(units), dtype=torch.float64), 0
    for row in range(len(query)):
        where = real[row].nonzero()[:, 0].tolist()
        centred = key[row].double() - key[row][:, where].double().mean(1, keepdim=True)
        for i in where:
            for j in where:
                if (i - j if causal else abs(i - j)) >= distance:
                    pairs += group
                    for head in range(query.shape[1]):
                        for unit, dims in enumerate(units.tolist()):
                            product = query[row, head, i, dims].double() @ centred[head // group, j, dims]
                            energy[head // group, unit] += product**2
    return energy / pairs


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_energy_is_the_sum_over_far_pairs(family, padding):
    """Also over those that Mistral's sliding window hides."""
    fields = {"sliding_window": 9} if family == "mistral" else {}
    model, given = make(family, dtype=torch.float64, **fields), inputs(family, padding)
    energy = st.far_energy(model, given, distance=13)
    assert model.config._attn_implementation == "sdpa"
    set_attention_implementation(model, SPY)
    model(**given)
    units = unit_dimensions("halves" if family in ROTARY else None, HEAD)
    for stack, modules in self_attention(model).items():
        own = given.get("attention_mask") if stack == "encoder" or family != "t5" else None
        for index, module in enumerate(modules):
            query, key = seen[id(module)]
            real = torch.ones(2, key.shape[2], dtype=torch.bool) if own is None else own.bool()
            expected = brute_force(query, key, real, units, 13, causal=stack == "decoder")
            torch.testing.assert_close(energy[stack][index], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_measured_order_is_by_energy_over_all_batches(family):
    model, batches = make(family), [inputs(family), inputs(family, "left")]
    model.train()
    energy, order = st.far_energy(model, batches), st.measure_order(model, batches)
    assert model.training
    assert order.keys() == energy.keys()
    for stack, layers in order.items():
        for layer, heads in zip(energy[stack], layers, strict=True):
            for head, places in zip(layer, heads, strict=True):
                assert torch.equal(head[places], head.sort(descending=True).values)
    st.set_hierarchy(model, LEVELS, order=order)


def test_bad_measures():
    model = make("llama")
    with pytest.raises(ValueError, match="distance must be a positive integer"):
        st.far_energy(model, tokens(), distance=0)
    with pytest.raises(ValueError, match="at least distance = 21 apart"):
        st.far_energy(model, tokens(), distance=21)
    with pytest.raises(TypeError, match="batches must be token ids"):
        st.far_energy(model, ["text"])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", ["as_trained", "slowest_first", "by head"])
@pytest.mark.parametrize("family", ROTARY)
def test_under_rotation_every_level_sees_relative_position_alone(family, order):
    """The same token at every place: with whole pairs, a prefix of the dimensions scores by `i - j` alone."""
    model = make(family, dtype=torch.float64)
    by_head = [[torch.randperm(4).tolist() for _ in range(2)] for _ in range(2)]
    st.set_hierarchy(model, LEVELS, order=by_head if order == "by head" else order)
    attention, length = model.model.layers[0].self_attn, 20
    query, key = (torch.randn(1, heads, 1, HEAD, dtype=torch.float64).expand(-1, -1, length, -1) for heads in (4, 2))
    kind = ("sliding_attention",) if family == "gemma3" else ()
    cos, sin = model.model.rotary_emb(query, torch.arange(length)[None], *kind)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)

    def uneven(query, key, width):
        """Return the largest deviation among scores of one distance."""
        score = query[..., :width] @ key[..., :width].repeat_interleave(2, dim=1).mT
        return max(float(score.diagonal(-shift, 2, 3).std(-1).max()) for shift in range(length - 1))

    arranged = [attention.structattn_levels.arrange(x) for x in (query, key)]
    rounding = uneven(query, key, HEAD)  # transformers rounds its cosines to float32
    for width in LEVELS.prefix_ranks:
        assert uneven(*arranged, width) <= 2 * rounding
    assert uneven(query, key, 4) > 1e4 * rounding


def test_orders_by_frequency():
    model, x = make("llama"), tokens()
    logits = {}
    for order in ("as_trained", "fastest_first", "slowest_first"):
        st.set_hierarchy(model, LEVELS, order=order)
        logits[order] = model(x).logits
    assert torch.equal(logits["as_trained"], logits["fastest_first"])
    assert (logits["as_trained"] - logits["slowest_first"]).abs().max() > 1e-3
    assert model.config.structattn_mlr["decoder"][0]["order"] == [[3, 2, 1, 0]]


def test_pairs_of_neighbours_are_found(monkeypatch):
    """Read neighbours off `rotate_half`, as in the Cohere models."""
    model = make("llama")
    attention = model.model.layers[0].self_attn
    import transformers.models.llama.modeling_llama as file

    monkeypatch.setattr(file, "rotate_half", lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2))
    assert find_pairing(model, attention, "attention", HEAD) == "neighbours"
    assert unit_dimensions("neighbours", 4).tolist() == [[0, 1], [2, 3]]
    monkeypatch.setattr(file, "rotate_half", lambda x: -x.flip(-1))
    with pytest.raises(ValueError, match="cannot tell which dimensions"):
        find_pairing(model, attention, "attention", HEAD)
