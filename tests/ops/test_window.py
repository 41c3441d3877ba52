"""One level with a window, sliding-window attention, against a dense masked softmax in float64, and its price."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structattn import Hierarchy, flops, mlr_attention
from structattn.ops import tiled
from structattn.ops.call import Call
from tests.tolerance import assert_calibrated


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    is_causal: bool,
    start: list[int] | None = None,
    end: list[int] | None = None,
    offset: int = 0,
) -> Tensor:
    """The definition: every score, a mask, a softmax."""
    batch, heads, query_length, rank = query.shape
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    i, j = torch.arange(query_length)[:, None] + offset, torch.arange(key.shape[2])
    visible = (i - j).abs() < window
    if is_causal:
        visible = visible & (j <= i)
    first = torch.tensor(start or [0] * batch).view(-1, 1, 1, 1)
    last = torch.tensor(end or [key.shape[2]] * batch).view(-1, 1, 1, 1)
    visible = visible & (i >= first) & (j >= first) & (j < last)
    score = (query @ key.mT / rank**0.5).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (torch.softmax(score, -1) * visible) @ value


def attend(query: Tensor, key: Tensor, value: Tensor, window: int, **options: object) -> Tensor:
    return mlr_attention(query, key, value, Hierarchy((query.shape[-1],), windows=(window,)), **options)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    length = draw(st.integers(1, 70))
    offset = draw(st.sampled_from([0, 0, draw(st.integers(0, length - 1))]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    call = {
        "window": draw(st.integers(1, 90)),
        "is_causal": draw(st.booleans()),
        "offset": offset,
        "shapes": [
            (2, 4, draw(st.integers(1, length - offset)) if offset else length, 3),
            (2, kv_heads, length, 3),
            (2, kv_heads, length, draw(st.sampled_from([3, 5]))),
        ],
        "start": None,
        "end": None,
        "seed": draw(st.integers(0, 2**31)),
    }
    if draw(st.booleans()):
        call["start"] = draw(st.lists(st.integers(0, length), min_size=2, max_size=2))
        call["end"] = [draw(st.integers(first, length)) for first in call["start"]]
    return call


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@settings(max_examples=100, deadline=None)
@given(call=calls())
def test_equals_dense_forward_and_backward(backend: str, call: dict) -> None:
    generator = torch.Generator().manual_seed(call["seed"])
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in call["shapes"]]
    start, end = (None if call[name] is None else torch.tensor(call[name]) for name in ("start", "end"))
    options = {"is_causal": call["is_causal"], "enable_gqa": True, "backend": backend}
    out = attend(*tensors, call["window"], key_start=start, key_end=end, query_offset=call["offset"], **options)
    expected = dense(*tensors, call["window"], call["is_causal"], call["start"], call["end"], call["offset"])
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    assert_calibrated(out, expected, expected)
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_calibrated(grad, expected_grad, expected_grad, "gradient")


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    query, key, value = (torch.randn(2, 2, 12, 4, requires_grad=True) for _ in range(3))
    start, end = torch.tensor([5, 0]), torch.tensor([9, 0])
    out = attend(query, key, value, 2, key_start=start, key_end=end, is_causal=True)
    assert (out[0, :, :5] == 0).all()
    assert (out[0, :, 10:] == 0).all()  # the two keys up to 10 are 9 and 10, padding both
    assert (out[0, :, 5:10] != 0).all()
    assert (out[1] == 0).all()
    out.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[1] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(is_causal: bool, padded: bool) -> None:
    length, window = 4096, 16
    query, key, value = (torch.randn(1, 1, length, 4) for _ in range(3))
    start = torch.tensor([7]) if padded else None
    hierarchy = Hierarchy((4,), windows=(window,))
    call = Call(query, key, value, None, start, None, None, hierarchy, is_causal, 0.5, 0, 0.0)
    with LargestTensor() as largest:  # which does not see into the operator
        out, lse = tiled.forward(call)
        tiled.backward(call, torch.ones_like(out), out, lse, needs_bias_grad=False)
    assert largest.numbers <= 3 * length * window


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 16), (16, 16), (17, 16), (33, 16), (100, 16), (64, 1)])
def test_flops_are_those_of_the_visible_pairs(length: int, window: int, value_dim: int, is_causal: bool) -> None:
    query, key = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 3, length, value_dim, requires_grad=True)
    hierarchy = Hierarchy((8,), windows=(window,))
    expected = flops.attention(hierarchy, value_dim, length, heads=3, batch=2, is_causal=is_causal)
    position = torch.arange(length)
    seen = (position[:, None] - position).abs() < window
    pairs = int((seen.tril() if is_causal else seen).sum())
    assert expected == 6 * pairs * flops.Flops(2 * (8 + value_dim), 2 * (3 * 8 + 2 * value_dim))
    with flops.counter() as count:
        out = attend(query, key, value, window, is_causal=is_causal)
    assert count.get_total_flops() == expected.forward
    with flops.counter() as count:
        out.sum().backward()
    assert count.get_total_flops() == expected.backward


def test_flops_grow_with_the_length_alone() -> None:
    hierarchy = Hierarchy((8,), windows=(64,))
    long, longer = (flops.attention(hierarchy, 8, length, is_causal=True).training for length in (64 * 20, 64 * 40))
    assert longer < 2.1 * long


def test_dropout_is_seeded_and_keeps_the_mean() -> None:
    query, key = torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4)
    value = torch.ones(1, 1, 256, 4)
    torch.manual_seed(0)
    first = attend(query, key, value, 32, is_causal=True, dropout_p=0.3)
    second = attend(query, key, value, 32, is_causal=True, dropout_p=0.3)
    torch.manual_seed(0)
    again = attend(query, key, value, 32, is_causal=True, dropout_p=0.3)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, second)
    assert abs(first.mean() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_dim", [16, 8])
def test_error_is_that_of_plain_pytorch(dtype: torch.dtype, value_dim: int) -> None:
    torch.manual_seed(0)
    shapes = [(1, 2, 100, 16), (1, 2, 100, 16), (1, 2, 100, value_dim)]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    exact = dense(*(tensor.double() for tensor in tensors), 24, True)
    plain = dense(*tensors, 24, True)
    out = attend(*tensors, 24, is_causal=True)
    assert_calibrated(out, exact, plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, r"windows\[0\] must be a positive integer"),
        ({"window": 2.0}, TypeError, r"windows\[0\] must be a positive integer"),
        ({"query": "x"}, TypeError, "query must be a tensor"),
        ({"key": torch.zeros(1, 2, 8, 5)}, ValueError, "key must have the query's batch and width"),
        ({"value": torch.zeros(1, 2, 7, 4)}, ValueError, "value must be"),
        ({"key": torch.zeros(1, 1, 8, 4), "value": torch.zeros(1, 1, 8, 4)}, ValueError, "enable_gqa"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ({"query": torch.zeros(1, 2, 8, 0), "key": torch.zeros(1, 2, 8, 0)}, ValueError, "a width of at least 1"),
        ({"query_offset": 1}, ValueError, "query_offset must be between 0 and 0"),
        ({"key_start": torch.tensor([1.0])}, TypeError, "key_start must be an int32 or int64"),
        ({"key_end": torch.tensor([1, 2])}, ValueError, "key_end must have one entry per row"),
        ({"key_end": torch.tensor([9])}, ValueError, "key_end <= Tk = 8"),
        ({"key_start": torch.tensor([5]), "key_end": torch.tensor([4])}, ValueError, "key_start = 5, key_end = 4"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    call = {name: torch.zeros(1, 2, 8, 4) for name in ("query", "key", "value")} | {"window": 4} | change
    window = call.pop("window")
    with pytest.raises(error, match=message):
        mlr_attention(hierarchy=Hierarchy((4,), windows=(window,)), **call)


def test_no_queries() -> None:
    """A length of zero is a length, of the queries alone and of all, with padding and without."""
    some, none = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 0, 4, requires_grad=True)
    bound = torch.tensor([0, 0])
    for key, start in ((some, None), (some, bound), (none, bound), (none, None)):
        out = attend(none, key, key, 3, key_start=start, is_causal=True)
        assert out.shape == (2, 2, 0, 4)
        assert torch.autograd.grad(out.sum(), none)[0].shape == none.shape
