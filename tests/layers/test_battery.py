"""One battery for every attention layer: length, padding, causality, gradients, dropout, module state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from structattn.layers import RotaryEmbedding, build_attention
from structattn.ops.key_span import KeySpan
from tests.layers.cases import CLOSE, DIM, HEADS, ROTARY, SPELLINGS, build, each_kind, tokens
from tests.tolerance import assert_calibrated


@each_kind
@pytest.mark.parametrize("is_causal", [True, False])
def test_any_length(spelling: str, is_causal: bool) -> None:
    layer = build(spelling, is_causal=is_causal)
    for length in (1, 2, 7, 65, 100):
        x = tokens(2, length)
        out = layer(x)
        assert out.shape == x.shape
        assert out.isfinite().all()


@each_kind
def test_a_row_does_not_see_the_others(spelling: str) -> None:
    layer, x = build(spelling), tokens(3, 9)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), **CLOSE)


@each_kind
def test_causal_layers_do_not_look_ahead(spelling: str) -> None:
    layer, x = build(spelling), tokens(1, 20)
    changed = x.clone()
    changed[:, 11] += 1.0
    difference = (layer(x) - layer(changed)).abs().amax(-1)[0]
    assert (difference[:11] == 0).all()
    assert (difference[11:14] > 0).all()


@each_kind
def test_other_layers_look_both_ways(spelling: str) -> None:
    layer, x = build(spelling, is_causal=False), tokens(1, 20)
    changed = x.clone()
    changed[:, 11] += 1.0
    difference = (layer(x) - layer(changed)).abs().amax(-1)[0]
    assert (difference[9:14] > 0).all()


@pytest.mark.parametrize("kind", ["plain", "rotary"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_padding_changes_nothing(kind: str, data: st.DataObject) -> None:
    rotary = RotaryEmbedding() if kind == "rotary" else None
    spelling = data.draw(st.sampled_from(ROTARY if rotary else SPELLINGS))
    layer = build(spelling, is_causal=data.draw(st.booleans()), rotary=rotary)
    length = data.draw(st.integers(1, 40))
    starts = data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2))
    ends = [data.draw(st.integers(start + 1, length)) for start in starts]
    x = 10 * tokens(2, length, seed=data.draw(st.integers(0, 100)))
    key_start = torch.tensor(starts) if data.draw(st.booleans()) or max(starts) else None
    key_end = torch.tensor(ends) if data.draw(st.booleans()) or min(ends) < length else None
    out = layer(x, key_start=key_start, key_end=key_end)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        torch.testing.assert_close(out[row, start:end], layer(x[row : row + 1, start:end])[0], **CLOSE)
        assert (out[row, :start] == 0).all()


@each_kind
def test_padding_takes_no_gradient(spelling: str) -> None:
    layer = build(spelling)
    x = tokens(1, 12).requires_grad_()
    real = x.detach()[:, 3:9].clone().requires_grad_()
    layer(x, key_start=torch.tensor([3]), key_end=torch.tensor([9]))[:, 3:9].square().sum().backward()
    padded = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(real).square().sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :3] == 0).all()
    assert (x.grad[:, 9:] == 0).all()
    torch.testing.assert_close(x.grad[:, 3:9], real.grad, **CLOSE)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(padded[name], parameter.grad, msg=name, **CLOSE)


@each_kind
def test_gradients(spelling: str) -> None:
    layer = build(spelling)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [tokens(2, 6).requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@each_kind
def test_every_parameter_is_used(spelling: str) -> None:
    layer = build(spelling, bias=True)
    layer(tokens(2, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        # A bias on all keys, and the mean that a norm takes off, leave softmax as it is.
        assert name == "k_proj.bias" or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spelling", [spelling for spelling in SPELLINGS if spelling != "standard:1"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_heads_are_repeated_heads(spelling: str, kv_heads: int) -> None:
    grouped = build(spelling, kv_heads=kv_heads)
    full = build(spelling)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        if name in state:
            heads = state[name].unflatten(0, (kv_heads, -1))
            state[name] = heads.repeat_interleave(HEADS // kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = tokens(2, 11)
    torch.testing.assert_close(grouped(x), full(x), **CLOSE)


@each_kind
def test_dropout_is_seeded_and_off_in_evaluation(spelling: str) -> None:
    layer, plain, x = build(spelling, dropout=0.4), build(spelling), tokens(2, 20)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    torch.testing.assert_close(layer.eval()(x), plain(x), **CLOSE)


@each_kind
def test_copies_and_state(spelling: str) -> None:
    layer, x = build(spelling, bias=True), tokens(2, 9)
    other = build(spelling, bias=True, seed=5)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


@each_kind
def test_initialisation_is_seeded(spelling: str) -> None:
    x = tokens(1, 5)
    layer = build(spelling)
    torch.testing.assert_close(build(spelling)(x), layer(x), rtol=0, atol=0)
    drawn = copy.deepcopy(layer)
    drawn.reset_parameters(torch.Generator().manual_seed(3))
    again = copy.deepcopy(layer)
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert not torch.equal(drawn(x), layer(x))
    torch.testing.assert_close(drawn(x), again(x), rtol=0, atol=0)
    assert all((parameter == 1).all() for name, parameter in drawn.named_parameters() if "norm" in name)


@each_kind
def test_fans_name_every_matrix(spelling: str) -> None:
    layer = build(spelling, bias=True)
    vectors = {name for name, _ in layer.named_parameters() if name.endswith(".bias") or "norm" in name}
    fans = layer.fans()
    assert set(fans) == {name for name, _ in layer.named_parameters()} - vectors
    weights = dict(layer.named_parameters())
    for name, (fan_in, fan_out) in fans.items():
        if name.endswith("_proj.weight"):
            assert weights[name].shape == (fan_out, fan_in)
    assert fans["out_proj.weight"] == (layer.heads * layer.value_dim, DIM)


def test_initial_deviation_is_one_over_the_root_of_fan_in() -> None:
    layer = build_attention("btt", 256, 4, 64, generator=torch.Generator().manual_seed(0))
    parameters = dict(layer.named_parameters())
    for name, (fan_in, _) in layer.fans().items():
        assert parameters[name].std().item() == pytest.approx(fan_in**-0.5, rel=0.05), name
    assert layer.fans()["structure.right_1"] == (16, 16)


@each_kind
@torch.no_grad()
def test_low_precision(spelling: str) -> None:
    """Against the error that rounding parameters and input alone makes."""
    layer, x = build(spelling), tokens(2, 12)
    exact = layer(x)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    rounded = copy.deepcopy(low).double()(x.to(torch.bfloat16).double()).to(torch.bfloat16)
    assert_calibrated(low(x.to(torch.bfloat16)), exact, rounded, "in bfloat16")
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_calibrated(single(x.float()), exact, rounded, "under autocast")


@pytest.mark.parametrize("spelling", ["standard", "mlr", "gswa:3|2", "btt", "btt+side=query"])
def test_compiles_whole(spelling: str) -> None:
    torch._dynamo.reset()
    layer = build(spelling)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for length in (9, 14):
        x = tokens(2, length).requires_grad_()
        out = compiled(x, key_start=torch.tensor([0, 2]))
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        expected = layer(x, key_start=torch.tensor([0, 2]))
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], **CLOSE)


@each_kind
def test_builds_on_the_meta_device(spelling: str) -> None:
    with torch.device("meta"):
        layer = build(spelling, generator=None)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert layer(tokens(1, 5)).isfinite().all()


@pytest.mark.parametrize("spelling", ["standard", "swa:3", "gswa:3|2", "mlr:2|2", "lowrank", "btt"])
def test_a_chunk_of_queries_against_cached_keys(spelling: str) -> None:
    """Project new tokens, attend to all keys so far, as with a cache."""
    layer, x = build(spelling, rotary=RotaryEmbedding()), tokens(2, 21)
    _, key, value = layer.project(x, torch.arange(21))
    query, _, _ = layer.project(x[:, 17:], torch.arange(17, 21))
    chunk = layer.output(layer.attend(query, key, value, KeySpan(query_offset=17)))
    torch.testing.assert_close(chunk, layer(x)[:, 17:], **CLOSE)


@pytest.mark.parametrize(
    ("x", "padding", "error", "message"),
    [
        ("x", {}, TypeError, "x must be a tensor"),
        (torch.zeros(2, DIM), {}, ValueError, r"x must have shape \(B, T, D\) with D = 16"),
        (torch.zeros(1, 2, DIM - 1).double(), {}, ValueError, "D = 16"),
        (torch.zeros(1, 2, DIM), {}, TypeError, "torch.float64, got torch.float32"),
        (tokens(1, 4), {"key_start": torch.tensor([0.0])}, TypeError, "key_start must be an int32"),
        (tokens(1, 4), {"key_end": torch.tensor([1, 2])}, ValueError, "key_end must have one entry per row"),
        (tokens(1, 4), {"key_end": torch.tensor([5])}, ValueError, "key_end <= Tk = 4"),
        (tokens(1, 4), {"key_start": torch.tensor([3]), "key_end": torch.tensor([2])}, ValueError, "in row 0"),
    ],
)
@pytest.mark.parametrize("spelling", ["standard", "swa:3", "mlr", "btt"])
def test_bad_input(spelling: str, x: object, padding: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(spelling)(x, **padding)
