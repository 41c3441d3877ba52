"""Every backend through one battery, and the promises of the face."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from structattn import Hierarchy, mlr_attention
from structattn.ops import backends, tiled
from structattn.ops.registry import REGISTRY
from tests.ops.battery import (
    DEEP,
    EQUAL,
    FLAT,
    HIERARCHIES,
    NEAR,
    ODD,
    SINKS_AND_LEVELS,
    SLIDING,
    Case,
    cases,
    check,
    definition,
    names,
    results,
)
from tests.ops.drawn import drawn_hierarchies
from tests.tolerance import assert_calibrated

CASES = cases()


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("case", CASES)
def test_backend_against_definition(backend, case):
    check(CASES[case], backend)


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "deep-257-causal",
        "odd-100-full",
        "padding-causal",
        "gqa-8:2-bias",
        "strided",
        "flat-65-causal",
        "near-257-causal",
        "near-100-full",
        "sliding-257-causal",
        "windows-gqa-bias",
        "windows-large-scores-causal",
        "sinks-levels-257-causal",
        "sinks-gqa-bias-full",
    ],
)
def test_backend_in_other_dtypes(backend, dtype, case):
    case = replace(CASES[case], dtype=dtype)
    if (backend, dtype) == ("cpu", torch.float64):
        with pytest.raises(ValueError, match=r"it serves float32, bfloat16 and float16, got torch.float64"):
            check(case, backend)
    else:
        check(case, backend)


@st.composite
def drawn_cases(draw):
    hierarchy, value_width = draw(drawn_hierarchies(with_sinks=True))
    keys = draw(st.integers(1, 150))
    queries = draw(st.integers(1, keys))
    start = draw(st.integers(0, keys))
    group = draw(st.sampled_from([1, 2]))
    return Case(
        hierarchy,
        query_length=queries,
        key_length=keys,
        query_offset=draw(st.integers(0, keys - queries)),
        is_causal=draw(st.booleans()),
        heads=2 * group,
        value_width=value_width,
        key_start=(0, start),
        key_end=(draw(st.integers(0, keys)), draw(st.integers(start, keys))),
        bias=draw(st.none() | st.tuples(*[st.booleans()] * 4)),
    )


@pytest.mark.parametrize("backend", names())
def test_backend_on_drawn_cases(backend):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(drawn_cases())
    def run(case):
        check(case, backend)

    run()


def test_battery_fails_a_corrupted_backend(monkeypatch):
    """A tile edge that is off by one position, and a gradient that forgets a gain: both must be seen."""
    whole_runs = tiled.key_runs
    monkeypatch.setattr(tiled, "key_runs", lambda *args: list(whole_runs(*args))[1:] or list(whole_runs(*args)))
    with pytest.raises(AssertionError, match="output"):
        check(CASES["deep-257-causal"], "tiled")
    monkeypatch.undo()
    correct = tiled.backward

    def forgetful(call, *args, **kwargs):
        return correct(replace(call, hierarchy=replace_gains(call.hierarchy)), *args, **kwargs)

    def replace_gains(hierarchy):
        return Hierarchy(hierarchy.ranks, hierarchy.sizes)

    monkeypatch.setattr(tiled, "backward", forgetful)
    with pytest.raises(AssertionError, match="query gradient"):
        check(CASES["deep-257-causal"], "tiled")


# --- meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_level_is_scaled_dot_product_attention(backend, is_causal):
    query, key, value = Case(FLAT, 130, dtype=torch.float32).tensors().values()
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)), is_causal=is_causal)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    actual = mlr_attention(query, key, value, FLAT, is_causal=is_causal, backend=backend)
    assert_calibrated(actual, exact, plain)


def test_paper_form():
    """The paper's sum of block-diagonal products, one per level, weight 1/r_l, divided by the number of levels."""
    length, ranks = 1024, DEEP.ranks
    query, key, value = (torch.randn(1, 2, length, 64, dtype=torch.float64) for _ in range(3))
    total = torch.zeros(1, 2, length, length, dtype=torch.float64)
    depth = torch.zeros(length, length, dtype=torch.float64)
    for level, (q, k) in enumerate(zip(query.split(ranks, -1), key.split(ranks, -1), strict=True)):
        size = length // 2**level
        q_blocks, k_blocks = (x.unflatten(2, (-1, size)) for x in (q, k))
        products = q_blocks @ k_blocks.transpose(-1, -2) / ranks[level]
        for block in range(length // size):
            here = slice(block * size, (block + 1) * size)
            total[:, :, here, here] += products[:, :, block]
            depth[here, here] += 1
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (total / depth).masked_fill(mask, -torch.inf).softmax(-1) @ value

    weights = torch.cat([torch.full((rank,), 1 / rank, dtype=torch.float64) for rank in ranks])
    for backend in ("tiled", "reference"):
        actual = mlr_attention(query * weights, key, value, DEEP, is_causal=True, scale=1.0, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", names())
def test_padded_row_equals_the_row_alone(backend):
    length, start, end = 90, 13, 77
    query, key, value = Case(ODD, length, batch=2).tensors().values()
    bounds = {"key_start": torch.tensor([start, 0]), "key_end": torch.tensor([end, length])}
    padded = mlr_attention(query, key, value, ODD, is_causal=True, backend=backend, **bounds)
    alone = [x[:1, :, start:end] for x in (query, key, value)]
    assert_calibrated(padded[:1, :, start:end], *definition(*alone, ODD, is_causal=True))
    assert torch.equal(padded[0, :, :start], torch.zeros_like(padded[0, :, :start]))


@pytest.mark.parametrize("backend", names())
def test_queries_with_nothing_to_see_give_zeros(backend):
    """No valid key, or every score -inf by the bias: zeros and zero gradients, also of the bias."""
    case = replace(CASES["empty-row-causal"], bias=(True, True, True, True))
    values = results(case, backend)
    assert all(torch.isfinite(value).all() for value in values.values())
    assert not values["output"][1:].any()
    assert not values["query gradient"][1:].any()

    query, key, value = (x.requires_grad_() for x in Case(EQUAL, 40).tensors().values())
    bias = torch.zeros(1, 1, 40, 40).index_fill_(2, torch.tensor([5]), -torch.inf).requires_grad_()
    out = mlr_attention(query, key, value, EQUAL, attn_bias=bias, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value, bias))
    assert not out[:, :, 5].any()
    assert out[:, :, 6].all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][:, :, 5].any()


@pytest.mark.parametrize("backend", names())
def test_infinite_bias_is_a_mask(backend):
    query, key, value = Case(DEEP, 70, is_causal=False).tensors().values()
    bias = torch.zeros(70, 70).masked_fill(torch.ones(70, 70).triu(1) > 0, -torch.inf)
    masked = mlr_attention(query, key, value, DEEP, attn_bias=bias, backend=backend)
    assert_calibrated(masked, *definition(query, key, value, DEEP, is_causal=True))


# --- dropout ----------------------------------------------------------------------------------------------------------


def _dropped(backend, seed, dropout_p=0.3, dtype=torch.float32):
    """Attention over values that are one-hot, so that the output is the dropped probabilities themselves."""
    length = 300
    query, key, _ = (tensor.to(dtype) for tensor in Case(DEEP, length, batch=1).tensors().values())
    value = torch.eye(length, dtype=dtype).expand(1, 2, length, length)
    torch.manual_seed(seed)
    return mlr_attention(query, key, value, DEEP, is_causal=True, dropout_p=dropout_p, backend=backend)


@pytest.mark.parametrize("backend", names())
def test_dropout(backend):
    first, again, other = _dropped(backend, 1), _dropped(backend, 1), _dropped(backend, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert_calibrated(first, _dropped("reference", 1, dtype=torch.float64), _dropped("reference", 1))
    kept = _dropped(backend, 1, 0.0)
    visible = kept > 1e-12
    share = (first[visible] == 0).float().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / int(visible.sum())) ** 0.5
    survivors = visible & (first != 0)
    torch.testing.assert_close(first[survivors], kept[survivors] / 0.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", names())
def test_one_dropout_mask_serves_all_value_levels(backend):
    inputs = [tensor.requires_grad_() for tensor in Case(NEAR, 300, batch=1).tensors().values()]

    def run(dtype, backend):
        torch.manual_seed(1)
        given = [tensor.to(dtype) for tensor in inputs]
        out = mlr_attention(*given, NEAR, is_causal=True, dropout_p=0.3, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    exact, plain = run(torch.float64, "reference"), run(torch.float32, "reference")
    largest_value = float(inputs[2].detach().abs().max())
    for actual, true, own in zip(run(torch.float32, backend), exact, plain, strict=True):
        assert_calibrated(actual, true.to(torch.float64), own, largest_term=max(largest_value, float(true.abs().max())))


@pytest.mark.parametrize("backend", names())
def test_one_dropout_mask_serves_sinks_and_levels(backend):
    check(replace(CASES["sinks-padding-causal"], dropout_p=0.3), backend)
    check(replace(CASES["sinks-257-full"], dropout_p=0.3), backend)


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("hierarchy", [NEAR, SLIDING, SINKS_AND_LEVELS], ids=["near", "sliding", "sinks"])
def test_windows_depend_on_distance_alone(backend, hierarchy):
    """Left padding changes nothing, and a chunk of queries gives what the whole call gives."""
    query, key, value = Case(hierarchy, 150).tensors().values()
    definitions = definition(query, key, value, hierarchy, is_causal=True)
    for pad in (1, 37, 200):
        padded = [torch.nn.functional.pad(tensor, (0, 0, pad, 0), value=3.0) for tensor in (query, key, value)]
        start = torch.full((2,), pad)
        out = mlr_attention(*padded, hierarchy, is_causal=True, key_start=start, backend=backend)
        assert_calibrated(out[:, :, pad:], *definitions, largest_term=float(value.abs().max()))
    for first, stop in ((0, 1), (40, 90), (149, 150)):
        chunk = mlr_attention(
            query[:, :, first:stop], key, value, hierarchy, is_causal=True, query_offset=first, backend=backend
        )
        exact, plain = (each[:, :, first:stop] for each in definitions)
        assert_calibrated(chunk, exact, plain, largest_term=float(value.abs().max()))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("text", ["2|1@*|4", "2|1v@w7|3"])
def test_dropout_gradients(backend, text):
    hierarchy = Hierarchy.parse(text)
    inputs = [torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(query, key, value):
        torch.manual_seed(3)
        return mlr_attention(query, key, value, hierarchy, is_causal=True, dropout_p=0.4, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("text", ["2|1|2@*|6|3/mean", "2|1|2v1|0|2@w8|5|2/mean"])
def test_gradcheck(backend, text):
    hierarchy = Hierarchy.parse(text)
    query = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, 9, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 7, 9, dtype=torch.float64, requires_grad=True)

    def run(query, key, value, bias):
        bounds = {"key_start": torch.tensor([0, 3]), "key_end": torch.tensor([9, 8])}
        return mlr_attention(
            query, key, value, hierarchy, attn_bias=bias, is_causal=True, query_offset=2, enable_gqa=True,
            backend=backend, **bounds,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (query, key, value, bias))


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("hierarchy", [DEEP, NEAR], ids=["blocks", "windows"])
def test_opcheck(backend, hierarchy):
    query, key, value, bias = (
        x.requires_grad_() for x in replace(CASES["bias-full-causal"], query_length=20).tensors().values()
    )
    bounds = (torch.tensor([0, 3]), torch.tensor([20, 18]))
    choices = (hierarchy.text, True, 0.125, 0, 0.0, backend)
    torch.library.opcheck(
        torch.ops.structattn.mlr_attention.default, (query, key, value, bias, *bounds, None, *choices)
    )
    torch.library.opcheck(
        torch.ops.structattn.mlr_attention.default, (query, key, value, None, None, None, None, *choices)
    )


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("text", ["4|2|2@32/mean", "4|2|2v4|0|4@w*|12|5", "4|2|2v4|0|4@w*|12|5+3"])
def test_compiles_whole(backend, text):
    hierarchy = Hierarchy.parse(text)
    torch._dynamo.reset()  # every parameter set compiles the same code anew

    def step(query, key, value, start):
        return mlr_attention(query, key, value, hierarchy, is_causal=True, key_start=start, backend=backend).sin()

    inputs = [torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3)]
    start = torch.tensor([0, 4])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = step(*inputs, start), compiled(*inputs, start)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(got, want)
    longer = [torch.randn(2, 2, 33, 8) for _ in range(3)]
    torch.testing.assert_close(compiled(*longer, start), step(*longer, start))


@pytest.mark.parametrize("backend", names())
@pytest.mark.parametrize("case", ["padding-causal", "bias-full-full", "gqa-8:2", "sinks-gqa-bias-full"])
def test_operator_and_direct_call_are_one(backend, case):
    """A call goes straight to the backend unless something watches operators: both ways give the same numbers."""
    direct = results(CASES[case], backend)
    with FlopCounterMode(display=False) as counter:
        watched = results(CASES[case], backend)
    assert counter.get_flop_counts()["Global"].keys() >= {torch.ops.structattn.mlr_attention}
    for name, value in watched.items():
        assert torch.equal(value, direct[name]), name


def test_direct_call_frees_and_guards_its_tensors():
    query, key, value = (torch.randn(1, 1, 8, 64, requires_grad=True) for _ in range(3))
    out = mlr_attention(query, key, value, FLAT)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    out = mlr_attention(query, key, value, FLAT)
    with torch.no_grad():
        query.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = mlr_attention(query, key, value, FLAT)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_autocast(backend):
    query, key, value = (torch.randn(1, 2, 30, 64) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = mlr_attention(query, key, value.bfloat16(), FLAT, backend=backend)
        compiled = torch.compile(mlr_attention, fullgraph=True, backend="aot_eager")
        assert compiled(query, key, value, FLAT, backend=backend).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    expected = mlr_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), FLAT, backend=backend)
    assert torch.equal(out, expected)
    with torch.autocast("cpu", torch.float16):
        assert mlr_attention(query, key, value, FLAT, backend="tiled").dtype == torch.float16


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("hierarchy", [*HIERARCHIES.values(), SINKS_AND_LEVELS], ids=str)
def test_flops(hierarchy, is_causal):
    """The counter sees the formula, forward and backward: 1 and 3 score products, 1 and 2 of the value's width."""
    length = 130
    width = sum(hierarchy.value_ranks or (16,))
    query, key = (torch.randn(2, 4, length, hierarchy.rank, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 4, length, width, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        mlr_attention(query, key, value, hierarchy, is_causal=is_causal)
    scores = hierarchy.score_flops(length, is_causal=is_causal)
    values = hierarchy.mixing_flops(length, value_dim=width, is_causal=is_causal)
    assert counter.get_total_flops() == 8 * (scores + values)
    with counter:
        mlr_attention(query, key, value, hierarchy, is_causal=is_causal).sum().backward()
    assert counter.get_total_flops() == 8 * (4 * scores + 3 * values)


def test_backends_are_listed_with_reasons():
    listed = {status.name: status for status in backends()}
    assert listed["tiled"].eligible
    assert listed["reference"].eligible
    assert str(listed["tiled"]) == "tiled: eligible"


def test_ineligible_backend_says_why_and_auto_passes_over_it(monkeypatch):
    class Refuses:
        def ineligible(self, call=None):
            return "it only serves Sundays"

    monkeypatch.setattr("structattn.ops.registry.REGISTRY", {"sunday": Refuses(), **REGISTRY})
    query = torch.randn(1, 1, 4, 64)
    with pytest.raises(ValueError, match=r"'sunday' cannot serve this call: it only serves Sundays"):
        mlr_attention(query, query, query, FLAT, backend="sunday")
    assert mlr_attention(query, query, query, FLAT).shape == query.shape


def test_unexpected_errors_are_not_swallowed(monkeypatch):
    def broken(call):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tiled, "forward", broken)
    query = torch.randn(1, 1, 4, 64)
    with pytest.raises(RuntimeError, match="out of luck"):
        mlr_attention(query, query, query, FLAT, backend="tiled")


# --- bad input --------------------------------------------------------------------------------------------------------

Q = torch.randn(2, 4, 10, 64)
K = torch.randn(2, 4, 12, 64)
FIVE = torch.tensor([5, 5])
BAD = {
    "query-type": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "query-axes": ({"query": Q[0]}, ValueError, r"query must have four axes .* got shape \(4, 10, 64\)"),
    "query-dtype": ({"query": Q.long()}, TypeError, "query must be float16.* got torch.int64"),
    "key-dtype": ({"key": K.double()}, TypeError, "key must have the query's dtype torch.float32, got torch.float64"),
    "key-device": ({"key": K.to("meta")}, ValueError, "key must be on the query's device cpu, got meta"),
    "key-batch": ({"key": K[:1], "value": K[:1]}, ValueError, r"expected \(B, Hkv, Tk, r\) = \(2, Hkv, Tk, 64\)"),
    "key-width": ({"key": K[..., :32]}, ValueError, r"key must have the query's batch and width"),
    "value-length": ({"value": K[:, :, :5]}, ValueError, r"value must be \(B, Hkv, Tk, dv\)"),
    "ranks-sum": ({"hierarchy": Hierarchy((32, 16), (None, 8))}, ValueError, r"query's width 64, got 32\|16 = 48"),
    "value-ranks-sum": (
        {"hierarchy": Hierarchy((64,), value_ranks=(32,))}, ValueError, "value_ranks must sum to the values' width 64",
    ),
    "hierarchy-type": ({"hierarchy": "64"}, TypeError, "hierarchy must be a structattn.Hierarchy, got str"),
    "heads-differ": ({"key": K[:, :2], "value": K[:, :2]}, ValueError, "4 heads unless enable_gqa=True, got 2"),
    "heads-divide": (
        {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}, ValueError, "must divide the query's 4 heads, got 3",
    ),
    "offset-past": ({"query_offset": 3}, ValueError, r"query_offset must be between 0 and 2 .* got 3"),
    "offset-negative": ({"query_offset": -1}, ValueError, "query_offset must be between 0 and 2"),
    "offset-float": ({"query_offset": 1.0}, TypeError, "query_offset must be an integer, got 1.0"),
    "causal-type": ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
    "bias-dtype": ({"attn_bias": torch.zeros(12).double()}, TypeError, "must be torch.float32, got torch.float64"),
    "width": ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, "query must have a width of at least 1"),
    "start-past-end": ({"key_start": FIVE, "key_end": FIVE - 1}, ValueError, "key_start = 5, key_end = 4 in row 0"),
    "end-past-keys": ({"key_end": torch.tensor([13, 12])}, ValueError, "key_end = 13 in row 0"),
    "start-negative": ({"key_start": torch.tensor([0, -1])}, ValueError, "key_start = -1.* in row 1"),
    "start-shape": ({"key_start": torch.tensor([0])}, ValueError, r"one entry per row, \(2,\), got \(1,\)"),
    "start-dtype": ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start must be an int32 or int64 tensor"),
    "start-type": ({"key_start": 3}, TypeError, "key_start must be an int32 or int64 tensor, got int"),
    "bias-shape": ({"attn_bias": torch.zeros(10, 10)}, ValueError, r"to .* = \(2, 4, 10, 12\), got \(10, 10\)"),
    "bias-axes": ({"attn_bias": torch.zeros(1, 1, 1, 1, 1)}, ValueError, "attn_bias must broadcast"),
    "bias-bool": ({"attn_bias": torch.ones(10, 12) > 0}, TypeError, r"turn a mask into a bias by torch.where"),
    "bias-type": ({"attn_bias": 1.0}, TypeError, "attn_bias must be a tensor, got float"),
    "bias-device": ({"attn_bias": torch.zeros(1, device="meta")}, ValueError, "must be on the query's device"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "backend": ({"backend": "tilde"}, ValueError, "backend must be one of auto, .*got 'tilde'; did you mean 'tiled'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    arguments = {"query": Q, "key": K, "value": K, "hierarchy": FLAT} | change
    with pytest.raises(error, match=message):
        mlr_attention(**arguments)


def test_no_queries_no_keys():
    """A length of zero is a length."""
    none = torch.randn(1, 2, 0, 64)
    assert mlr_attention(none, none, none, FLAT).shape == (1, 2, 0, 64)
    some = torch.randn(1, 2, 3, 64, requires_grad=True)
    out = mlr_attention(some, none, none, FLAT)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), some)[0].any()
