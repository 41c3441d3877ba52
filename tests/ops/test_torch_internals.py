"""The private names of torch: with each gone the op is as correct as before, only slower."""

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from structattn import Hierarchy, mlr_attention
from structattn.ops import arguments, operator, torch_internals
from tests.tolerance import assert_calibrated

HIERARCHY = Hierarchy((2, 2, 4), (None, 8, 4))
NAMES = (*torch_internals.WATCHERS, "_assert_async", "Tensor._version")


class Gone:
    """An attribute that hides an inherited one."""

    def __get__(self, *_):
        raise AttributeError


@contextmanager
def gone(name):
    """Take a name out of torch.

    Methods of tensors, which stand in an immutable type, are hidden.
    """
    *owners, last = name.split(".")
    owner = torch_internals.find(".".join(owners)) if owners else torch
    with pytest.MonkeyPatch.context() as patch:
        if owner is torch.Tensor:
            patch.setattr(owner, last, Gone())
        else:
            patch.delattr(owner, last)
        yield


def loaded():
    """The module of internals as a fresh import makes it."""
    spec = importlib.util.find_spec("structattn.ops.torch_internals")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NAMES)
def without(request, monkeypatch):
    """Return the op after an import that did not find one name.

    Torch itself, which uses the names, has it back.
    """
    with gone(request.param):
        assert torch_internals.find(request.param) is None
        fresh = loaded()
    monkeypatch.setattr(operator, "torch_internals", fresh)
    monkeypatch.setattr(arguments, "assert_later", fresh.assert_later)
    return request.param, fresh


def inputs(requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 20, 8)
    return [torch.randn(shape, generator=generator, requires_grad=requires_grad) for _ in range(3)]


def attend(query, key, value, backend="auto", **options):
    return mlr_attention(query, key, value, HIERARCHY, is_causal=True, backend=backend, **options)


def test_torch_has_every_name():
    """Else the short way around the operator is lost: say which name went, and find its successor."""
    assert [name for name in NAMES if torch_internals.find(name) is None] == []
    assert torch_internals.COMPLETE


def test_a_name_that_is_gone_closes_the_short_way(without):
    name, fresh = without
    assert (name not in torch_internals.WATCHERS) == fresh.COMPLETE
    assert fresh.is_plain(tuple(inputs())) == fresh.COMPLETE


def test_values_and_gradients(without):
    tensors = inputs(requires_grad=True)
    upstream = torch.ones(2, 3, 20, 8)

    def run(backend, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = attend(*leaves, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))

    exact, plain = run("reference", torch.float64), run("reference", torch.float32)
    for actual, right, near in zip(run("auto", torch.float32), exact, plain, strict=True):
        assert_calibrated(actual, right, near, largest_term=largest_term(tensors))


def largest_term(tensors):
    """The largest of the terms that an output or a gradient sums, see `battery.largest_terms`."""
    query, key, value = (tensor.detach() for tensor in tensors)
    score_grad = float(value.abs().sum(-1).max())
    return score_grad * max(1.0, float(query.abs().max()), float(key.abs().max()))


def test_negated_memory_and_zeros(without):
    """Tensors that do not hold their own numbers."""
    query, key, value = inputs()
    negated = torch._neg_view(query)
    torch.testing.assert_close(attend(negated, key, value), attend(-query, key, value), rtol=1e-5, atol=1e-5)
    zeros = torch._efficientzerotensor(key.shape)
    torch.testing.assert_close(attend(query, zeros, value), attend(query, torch.zeros_like(key), value))


def test_transforms(without):
    tensors = inputs()
    stacked = [torch.stack((tensor, 2 * tensor)) for tensor in tensors]
    each = torch.stack([attend(*(tensor[index] for tensor in stacked)) for index in range(2)])
    torch.testing.assert_close(torch.func.vmap(attend)(*stacked), each, rtol=1e-5, atol=1e-5)
    loss = lambda query: attend(query, *tensors[1:]).square().sum()  # noqa: E731
    query = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(query), query)
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused(without):
    query, key, value = inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        attend(query, forward_ad.make_dual(key, key), value)


def test_autocast(without):
    tensors = inputs(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*tensors)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    assert out.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(out.float(), attend(*tensors), rtol=0.05, atol=0.05)


def test_flops_are_counted(without):
    with FlopCounterMode(display=False) as counter:
        attend(*inputs())
    pairs = HIERARCHY.pair_counts(20, 20, is_causal=True)
    scores = sum(rank * count for rank, count in zip(HIERARCHY.ranks, pairs, strict=True))
    assert counter.get_total_flops() == 2 * 2 * 3 * (scores + 8 * pairs[0])


def test_compiled(without):
    tensors = inputs()
    torch.compiler.reset()  # each name that is gone is another program
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors), rtol=1e-5, atol=1e-5)


def test_bounds_are_checked(without):
    start, end = torch.tensor([0, 5]), torch.tensor([20, 3])
    with pytest.raises(ValueError, match="key_start = 5, key_end = 3 in row 1"):
        attend(*inputs(), key_start=start, key_end=end)


def test_an_assertion_that_cannot_wait_is_made_at_once():
    with gone("_assert_async"):
        fresh = loaded()
    fresh.assert_later(torch.tensor(True), "fine")
    with pytest.raises(ValueError, match="expected so"):
        fresh.assert_later(torch.tensor(False), "expected so")
    with pytest.raises(RuntimeError, match="expected so"):
        torch_internals.assert_later(torch.tensor(False), "expected so")


def test_writes_are_seen(without):
    _, fresh = without
    parameters = [torch.ones(3), torch.zeros(2)]
    before = fresh.count_writes(parameters)
    assert fresh.count_writes(parameters) == before
    parameters[1].add_(1)
    assert fresh.count_writes(parameters) != before
