"""Retrofitting: exact before truncation, and the order of dimensions that loses least after it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from structattn.layers.head_basis import HeadBasis, balancing_maps, order_pairs_by_energy
from structattn.models import LanguageModel
from structattn.models.mlr_conversion import convert_to_mlr, measure_head_moments
from tests.models.test_language import small, tokens, woken

MODELS = {
    "learned": {"positions": "learned"},
    "rotary": {"positions": "rotary"},
    "grouped": {"positions": "rotary", "kv_heads": 2},
    "grouped, learned": {"positions": "learned", "kv_heads": 2},
    "no norm": {"attention": "standard+qk_norm=false"},
    "paper's scale": {"attention": "standard+scale=8/r"},
}


def model_of(name):
    """In float64, with gains of norms drawn too."""
    model = woken(small(context_length=32, **MODELS[name])).double()
    for name, parameter in model.named_parameters():
        if "_norm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(11, (4, 32), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("far", [None, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_change_of_basis_alone_leaves_the_logits(name, far):
    model, x = model_of(name), tokens(length=32)
    fitted = convert_to_mlr(model, (8,), measure_head_moments(model, batches(), far))
    assert fitted.config.attention.startswith("mlr:8+")
    torch.testing.assert_close(fitted(x).logits, model(x).logits, rtol=1e-10, atol=1e-10)
    maps = torch.stack([block.attention.basis.query for block in fitted.backbone.layers])
    assert not torch.equal(maps, torch.eye(8, dtype=torch.float64).expand_as(maps))  # they do something


@pytest.mark.parametrize("name", MODELS)
def test_pairs_that_share_every_level_score_as_before(name):
    """Before the first edge of the smallest block nothing is cut off, whatever the ranks."""
    model, x = model_of(name), tokens(length=32)
    fitted = convert_to_mlr(model, (4, 2, 2), measure_head_moments(model, batches()))
    torch.testing.assert_close(fitted(x).logits[:, :8], model(x).logits[:, :8], rtol=1e-10, atol=1e-10)
    assert (fitted(x).logits[:, 8:] - model(x).logits[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_pairs_in_every_window_mix_as_before(name):
    """Before the smallest window is full nothing is cut off, in keys or in values."""
    model, x = model_of(name), tokens(length=32)
    moments = measure_head_moments(model, batches())
    fitted = convert_to_mlr(model, (4, 2, 2), moments, windows=(None, 16, 8), value_ranks=(2, 2, 4))
    torch.testing.assert_close(fitted(x).logits[:, :8], model(x).logits[:, :8], rtol=1e-10, atol=1e-10)
    assert (fitted(x).logits[:, 8:] - model(x).logits[:, 8:]).abs().max() > 1e-3
    assert "+windows=*|16|8+value_ranks=2|2|4" in fitted.config.attention
    sliding = convert_to_mlr(model, (8,), moments, windows=(8,))
    torch.testing.assert_close(sliding(x).logits[:, :8], model(x).logits[:, :8], rtol=1e-10, atol=1e-10)


def test_without_moments_dimensions_stay_in_their_order():
    model = model_of("learned")
    fitted = convert_to_mlr(model, (4, 4), None)
    assert torch.equal(fitted.backbone.layers[0].attention.basis.key, torch.eye(8, dtype=torch.float64).repeat(4, 1, 1))
    assert (
        fitted.config.attention
        == "mlr:4|4+block_sizes=*|16+level_weight=1/sqrt(r)+basis+value_ranks=8|0+frequencies=whole"
    )


def moments_of_any(seed=0, heads=3, rank=8):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, heads, rank, rank, generator=generator, dtype=torch.float64)
    return q @ q.transpose(-2, -1), k @ k.transpose(-2, -1)


def test_balanced_moments_are_equal_diagonal_and_descending():
    query, key = moments_of_any()
    a, b, sigma = balancing_maps(query, key)
    diagonal = torch.diag_embed(sigma)
    torch.testing.assert_close(a @ query @ a.transpose(-2, -1), diagonal, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b @ key @ b.transpose(-2, -1), diagonal, rtol=1e-10, atol=1e-10)
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    torch.testing.assert_close(a.transpose(-2, -1) @ b, eye, rtol=1e-10, atol=1e-10)
    assert (sigma.diff(dim=-1) <= 0).all()


def test_balancing_drops_the_least_energy():
    """Against every rotation drawn at random: `E[(q·k)²]` over independent pairs that truncation keeps."""
    query, key = moments_of_any()
    a, b, sigma = balancing_maps(query, key)

    def lost(maps, kept):
        a, b = maps
        dropped = a[:, kept:].transpose(-2, -1) @ b[:, kept:]  # the form that truncation takes from q·k
        return torch.einsum("hij,hjk,hkl,hil->h", query, dropped, key, dropped).sum()

    for kept in (1, 4, 7):
        best = lost((a, b), kept)
        torch.testing.assert_close(best, (sigma[:, kept:] ** 2).sum())
        for seed in range(20):
            drawn = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert lost((drawn, torch.linalg.inv(drawn).transpose(-2, -1)), kept) > best


def test_directions_that_calibration_never_saw_stay_invertible():
    query, key = moments_of_any()
    key[:, 0], key[:, :, 0] = 0.0, 0.0
    a, b, _ = balancing_maps(query, key)
    torch.testing.assert_close(a.transpose(-2, -1) @ b, torch.eye(8).double().expand(3, 8, 8), rtol=1e-6, atol=1e-6)


def test_pairs_come_by_energy():
    query, key = (
        torch.diag_embed(torch.tensor(d, dtype=torch.float64)) for d in ([1, 1, 3, 2, 1, 5], [1, 2, 1, 1, 2, 1])
    )
    permutation, same, energy = order_pairs_by_energy(query[None], key[None])
    assert torch.equal(permutation, same)
    assert energy.tolist() == [[7.0, 5.0, 3.0]]
    assert (permutation[0] @ torch.arange(6.0).double()).tolist() == [4.0, 5.0, 2.0, 3.0, 0.0, 1.0]


def test_energy_within_a_pair_counts_both_its_products():
    """Against the score itself, of independent rotated queries and keys."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 500, 4, generator=generator, dtype=torch.float64)
    mixed = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    q, k = q @ mixed, k @ mixed.T
    query, key = q.T @ q / 500, k.T @ k / 500
    pairs = torch.stack([(q[:, 2 * p : 2 * p + 2] @ k[:, 2 * p : 2 * p + 2].T).square().mean() for p in (0, 1)])
    _, _, energy = order_pairs_by_energy(query[None], key[None])
    torch.testing.assert_close(energy[0], pairs.sort(descending=True).values)


def test_far_moments_count_pairs_in_different_blocks():
    """Against a sum over every causal pair that is far."""
    model, x, far = model_of("grouped, learned"), batches(1)[0], 8
    layer = model.backbone.layers[0]
    seen = {}
    layer.attention.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    moments = measure_head_moments(model, [x], far)[0]
    query, key, _ = layer.attention.project(seen["x"], torch.arange(32))
    pairs = [(i, j) for i in range(32) for j in range(i + 1) if i // far != j // far]
    i, j = torch.tensor(pairs).T
    keys = key[:, 1, j].flatten(0, 1)
    mean = keys.mean(0)
    torch.testing.assert_close(moments.mean[1], mean)
    torch.testing.assert_close(moments.key[1], keys.T @ keys / len(keys) - mean[:, None] * mean)
    queries = query[:, 2:4][:, :, i].flatten(0, 2)  # the query heads that read key head 1
    torch.testing.assert_close(moments.query[1], queries.T @ queries / len(queries))


@pytest.mark.parametrize("levels", [{}, {"windows": (None, 8, 3), "value_ranks": (3, 0, 5)}], ids=["blocks", "windows"])
def test_files_and_generation(levels, tmp_path):
    model = woken(small(context_length=32, positions="rotary"))
    fitted = convert_to_mlr(model, (4, 2, 2), measure_head_moments(model, batches()), **levels)
    fitted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = tokens(length=20)
    assert torch.equal(loaded(x).logits, fitted(x).logits)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(loaded.generate(x, **options), fitted.generate(x, use_cache=False, **options))


def test_it_trains():
    model = woken(small(context_length=32, positions="rotary"))
    fitted = convert_to_mlr(model, (4, 2, 2), measure_head_moments(model, batches()))
    fitted(tokens(length=32), labels=tokens(length=32)).loss.backward()
    assert all(parameter.grad is not None for parameter in fitted.parameters())
    assert fitted.describe().keys() == dict(fitted.named_parameters()).keys()


def test_the_model_is_left_alone():
    model = model_of("learned").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert_to_mlr(model, (4, 4), measure_head_moments(model, batches()))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(block.attention._forward_pre_hooks for block in model.backbone.layers)


class TestBadInput:
    def test_other_attention(self):
        model = LanguageModel(small(attention="mlr:4,4"))
        with pytest.raises(TypeError, match="only standard attention can be retrofitted, got MLRAttention"):
            convert_to_mlr(model, (4, 4), None)
        with pytest.raises(TypeError, match="only standard attention"):
            measure_head_moments(model, batches())

    def test_another_number_of_heads(self):
        with pytest.raises(ValueError, match="must be standard in every block, got standard:1 in block 0"):
            convert_to_mlr(LanguageModel(small(attention="standard:1")), (16, 16), None)

    def test_ranks(self):
        with pytest.raises(ValueError, match="ranks must sum to the head width 8"):
            convert_to_mlr(model_of("learned"), (4, 2), None)
        with pytest.raises(ValueError, match=r"ranks\[1\] must be a positive integer, got 0"):
            convert_to_mlr(model_of("learned"), (8, 0), None)

    def test_windows_and_value_ranks(self):
        with pytest.raises(ValueError, match="block_sizes or windows, not both"):
            convert_to_mlr(model_of("learned"), (4, 4), None, (None, 8), windows=(None, 8))
        with pytest.raises(ValueError, match="windows must shrink"):
            convert_to_mlr(model_of("learned"), (4, 2, 2), None, windows=(None, 8, 8))
        with pytest.raises(ValueError, match=r"value_ranks must sum to the values' width 8, got 4\|2 = 6"):
            convert_to_mlr(model_of("learned"), (4, 4), None, windows=(None, 8), value_ranks=(4, 2))

    def test_odd_ranks_under_a_rotary_embedding(self):
        with pytest.raises(ValueError, match="even level ranks"):
            convert_to_mlr(model_of("rotary"), (5, 3), None)

    def test_no_text(self):
        with pytest.raises(ValueError, match="batches must hold pairs of tokens"):
            measure_head_moments(model_of("learned"), [])
        with pytest.raises(ValueError, match="far enough apart"):
            measure_head_moments(model_of("learned"), batches(), far=32)


def test_a_basis_starts_as_the_identity():
    basis = HeadBasis(2, 4)
    query, key = torch.randn(1, 4, 3, 4), torch.randn(1, 2, 3, 4)
    for given, mapped in zip((query, key), basis(query, key), strict=True):
        assert torch.equal(given, mapped)
