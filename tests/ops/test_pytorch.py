"""The op among PyTorch's own mechanisms: transforms, derivatives of other kinds, tracing, defaults, odd tensors.

What PyTorch's own attention does there, this one does too, or it says that it does not.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from structattn import Hierarchy, mlr_attention
from structattn.ops.cpu import library
from structattn.ops.decode import mlr_decode
from tests.ops.battery import names

LEVELS = Hierarchy.dyadic((4, 2, 2), 16)
NEAR = Hierarchy((4, 2, 2), windows=(None, 6, 3), value_ranks=(2, 0, 3))
SLIDING = Hierarchy((8,), windows=(6,))
SINKS = Hierarchy((4, 2, 2), windows=(6, 5, 3), value_ranks=(2, 0, 3), sinks=2)


def tensors(*batch, rows=2, requires_grad=False):
    """Query, key, value and a bias that rows share."""
    shapes = [(rows, 2, 13, 8), (rows, 2, 13, 8), (rows, 2, 13, 5), (1, 2, 13, 13)]
    return [torch.randn(*batch, *shape, requires_grad=requires_grad) for shape in shapes]


def attend(query, key, value, bias, backend="auto", levels=LEVELS):
    return mlr_attention(query, key, value, levels, is_causal=True, attn_bias=bias, backend=backend)


def loss(*given):
    return attend(*given).square().sum()


def assert_same(given, expected):
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")
class TestTransforms:
    @pytest.mark.parametrize("backend", names())
    @pytest.mark.parametrize("levels", [LEVELS, NEAR, SLIDING, SINKS], ids=str)
    def test_vmap(self, backend, levels):
        given, options = tensors(3), {"backend": backend, "levels": levels}
        rows = [attend(*(tensor[i] for tensor in given), **options) for i in range(3)]
        assert_same([torch.vmap(lambda *each: attend(*each, **options))(*given)], [torch.stack(rows)])

    @pytest.mark.parametrize("levels", [LEVELS, NEAR, SLIDING, SINKS], ids=str)
    def test_vmap_of_gradients(self, levels):
        given = tensors(3)
        grad = torch.func.grad(lambda *each: attend(*each, levels=levels).square().sum(), argnums=(0, 1, 2, 3))
        rows = [grad(*(tensor[i] for tensor in given)) for i in range(3)]
        assert_same(torch.vmap(grad)(*given), [torch.stack(each) for each in zip(*rows, strict=True)])

    def test_vmap_over_another_axis_and_with_shared_tensors(self):
        _, key, value, bias = tensors()
        queries = torch.randn(2, 2, 3, 13, 8)
        out = torch.vmap(attend, in_dims=(2, None, None, None), out_dims=1)(queries, key, value, bias)
        rows = [attend(queries[:, :, i], key, value, bias) for i in range(3)]
        assert_same([out], [torch.stack(rows, dim=1)])

    def test_vmap_with_padding(self):
        query, key, value, _ = tensors(3)
        start = torch.tensor([[0, 3], [1, 13], [5, 2]])

        def padded(query, key, value, start):
            return mlr_attention(query, key, value, LEVELS, key_start=start)

        rows = [padded(query[i], key[i], value[i], start[i]) for i in range(3)]
        assert_same([torch.vmap(padded)(query, key, value, start)], [torch.stack(rows)])

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_vmap_with_dropout(self, randomness):
        """Probabilities that are all alike: the mean of what is kept is what it would be without dropout."""
        query = torch.zeros(4, 64, 2, 16, 8)
        value = torch.ones(4, 64, 2, 16, 5)

        def dropped(query, value):
            return mlr_attention(query, query, value, LEVELS, dropout_p=0.25)

        out = torch.vmap(dropped, randomness=randomness)(query, value)
        assert out.mean() == pytest.approx(1, abs=0.02)
        assert out.std() > 0.05

    def test_gradients_of_each_sample(self):
        given = tensors(3)
        found = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*given)
        for i in range(3):
            each = [tensor[i].clone().requires_grad_() for tensor in given]
            assert_same([grad[i] for grad in found], torch.autograd.grad(loss(*each), each))

    def test_jacobian(self):
        query, key, value, bias = tensors(rows=1)
        jacobian = torch.func.jacrev(lambda query: attend(query, key, value, bias))(query)
        change = 1e-3 * torch.randn_like(query)
        step = attend(query + change, key, value, bias) - attend(query - change, key, value, bias)
        expected = torch.einsum("...bhtr,bhtr->...", jacobian, 2 * change)
        torch.testing.assert_close(expected, step, rtol=1e-2, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # PyTorch's own use, when a transform is first called.
class TestOtherDerivatives:
    def test_forward_mode_is_refused(self):
        given = tensors()
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda query: attend(query, *given[1:]), (given[0],), (given[0],))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                attend(given[0], forward_ad.make_dual(given[1], given[1]), *given[2:])
            assert_same([attend(*given)], [attend(*given)])  # Without a tangent there is nothing to lose.

    def test_second_derivatives_are_refused_when_asked_for(self):
        """Also where the gradient of the output is a constant, as that of a sum is."""
        given = tensors(requires_grad=True)
        grads = torch.autograd.grad(attend(*given).sum(), given, create_graph=True)
        assert_same(grads, torch.autograd.grad(attend(*given).sum(), given))
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.autograd.grad(grads[0].square().sum(), given[0])
        with pytest.raises(NotImplementedError, match=r"forward mode|second derivative"):
            torch.func.hessian(lambda query: loss(query, *given[1:]))(given[0].detach())


class TestTensorsOfOtherKinds:
    def test_a_view_that_negates(self):
        given = tensors(requires_grad=True)
        negated = torch.randn(2, 2, 13, 8, dtype=torch.cfloat).conj().imag
        assert negated.is_neg()
        assert_same([attend(negated, *given[1:])], [attend(negated.resolve_neg(), *given[1:])])
        grad = torch.randn(2, 2, 13, 5, dtype=torch.cfloat).conj().imag
        found = [torch.autograd.grad(attend(*given), given, each) for each in (grad, grad.resolve_neg())]
        assert_same(*found)

    def test_zeros_without_memory(self):
        given = tensors(requires_grad=True)
        out = attend(*given)
        for grad in torch.autograd.grad(out, given, torch._efficientzerotensor(out.shape)):
            assert not grad.any()

    @pytest.mark.parametrize("backend", names())
    def test_bounds_with_strides(self, backend):
        query, key, value, _ = tensors()
        bounds = torch.tensor([[2, 11], [0, 13]])
        given = {"is_causal": True, "backend": backend}
        out = mlr_attention(query, key, value, LEVELS, key_start=bounds[:, 0], key_end=bounds[:, 1], **given)
        start, end = bounds.t().contiguous()
        assert_same([out], [mlr_attention(query, key, value, LEVELS, key_start=start, key_end=end, **given)])

    @pytest.mark.parametrize("backend", names())
    def test_values_without_width(self, backend):
        query, key, value, bias = tensors()
        query.requires_grad_()
        out = attend(query, key, value[..., :0], bias, backend)
        assert out.shape == (2, 2, 13, 0)
        assert not torch.autograd.grad(out.sum(), query)[0].any()


class TestDefaults:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_of_the_dtype(self, dtype):
        given = tensors(requires_grad=True)
        expected = (attend(*given), *torch.autograd.grad(loss(*given), given))
        torch.set_default_dtype(dtype)
        try:
            assert_same((attend(*given), *torch.autograd.grad(loss(*given), given)), expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_of_the_device(self):
        given = tensors(requires_grad=True)
        expected = (attend(*given), *torch.autograd.grad(loss(*given), given))
        with torch.device("meta"):
            assert_same((attend(*given), *torch.autograd.grad(loss(*given), given)), expected)


class TestAutocast:
    def test_a_mask_is_no_bias(self):
        query, key, value, _ = tensors()
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=r"turn a mask into a bias by torch.where"),
        ):
            attend(query, key, value, torch.ones(13, 13, dtype=torch.bool))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_a_bias_of_any_low_precision(self, dtype):
        query, key, value, bias = tensors()
        bias = bias.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(query, key, value, bias)
        low = [tensor.bfloat16() for tensor in (query, key, value)]
        wide = bias.detach().float().requires_grad_()
        expected = attend(*low, wide)
        torch.testing.assert_close(out, expected)
        (grad,), (wanted,) = torch.autograd.grad(out.sum(), bias), torch.autograd.grad(expected.sum(), wide)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.float(), wanted, rtol=1e-2, atol=1e-2)

    def test_float64_stays_among_its_own(self):
        query, key, value, bias = (tensor.double() for tensor in tensors())
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(query, key, value, bias).dtype == torch.float64
            with pytest.raises(TypeError, match=r"key must have the query's dtype torch.float64, got torch.float32"):
                attend(query, key.float(), value, bias)
            with pytest.raises(TypeError, match=r"attn_bias must be torch.float32, got torch.float64"):
                attend(query.float(), key.float(), value.float(), bias)


@pytest.mark.filterwarnings("ignore:`torch.jit")
class TestGraphs:
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # Sizes are constants of a trace.
    def test_traced(self):
        query, key, value, bias = tensors()
        traced = torch.jit.trace(attend, (query, key, value, bias))
        assert_same([traced(key, query, value, bias)], [attend(key, query, value, bias)])

    def test_compiled_with_changing_lengths_and_scales(self):
        torch._dynamo.reset()
        compiled = torch.compile(mlr_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        for length, scale in ((13, None), (17, 0.3), (9, 0.4)):
            query = torch.randn(2, 2, length, 8)
            given = {"is_causal": True, "scale": scale}
            assert_same(
                [compiled(query, query, query, LEVELS, **given)], [mlr_attention(query, query, query, LEVELS, **given)]
            )

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_a_compiled_window_with_changing_lengths(self, is_causal):
        torch._dynamo.reset()
        compiled = torch.compile(mlr_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (23, 31):
            query = torch.randn(2, 2, length, 8)
            assert_same(
                [compiled(query, query, query, SLIDING, is_causal=is_causal)],
                [mlr_attention(query, query, query, SLIDING, is_causal=is_causal)],
            )

    def test_a_compiled_window_refuses_bad_bounds(self):
        torch._dynamo.reset()
        compiled = torch.compile(mlr_attention, fullgraph=True, backend="aot_eager")
        query = torch.randn(2, 2, 23, 8)
        compiled(query, query, query, SLIDING, key_start=torch.tensor([3, 0]))
        with pytest.raises(ValueError, match="expected 0 <= key_start <= key_end"):
            compiled(query, query, query, SLIDING, key_start=torch.tensor([30, 0]))

    def test_a_profiler_sees_it(self):
        given = tensors(requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss(*given).backward()
        seen = {event.key for event in profile.key_averages()}
        assert {"structattn::mlr_attention", "structattn::mlr_attention_backward"} <= seen

    @pytest.mark.parametrize("backend", names())
    def test_no_operator_in_python_between_autograd_and_a_backend(self, backend):
        node = attend(*tensors(requires_grad=True), backend).grad_fn
        in_cpp = library.state.differentiates and backend == "cpu"
        assert ("structattn" in node.name()) == in_cpp
        assert (type(node).__name__ == "_DirectMLRAttentionBackward") != in_cpp


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    hierarchy = Hierarchy(tuple(numpy.array([4, 4])), (None, numpy.int64(8)))
    query, key, value, _ = tensors()
    out = mlr_attention(query, key, value, hierarchy, scale=numpy.float32(0.5))
    assert_same([out], [mlr_attention(query, key, value, Hierarchy((4, 4), (None, 8)), scale=0.5)])


def test_decode_reads_bounds_of_any_form():
    levels = [torch.randn(2, 2, rank, 13) for rank in LEVELS.ranks]
    query, _, value, _ = tensors()
    call = {"key_length": 13, "level_starts": [0, 0, 0]}
    bounds = torch.tensor([[2, 5], [0, 7]])
    expected = mlr_decode(query[:, :, -1:], levels, value, LEVELS, key_start=bounds[:, 0].contiguous(), **call)
    for start in (bounds[:, 0], bounds[:, 0].int()):
        assert_same([mlr_decode(query[:, :, -1:], levels, value, LEVELS, key_start=start, **call)], [expected])
