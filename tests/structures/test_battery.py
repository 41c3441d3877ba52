"""One battery for every family: dense form, products, features, costs, and being a good module."""

import copy
import io

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import structattn.structures as structures
from structattn.structures import MLBTC
from tests.structures.cases import CASES, Case, each_case, each_heads, each_normalize, make, seeded, stack

F64 = torch.float64
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def vectors(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


@each_case
@each_heads
@each_normalize
class TestMatrix:
    """Every way to use the matrix is the dense matrix."""

    def test_call_on_identity_is_dense(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        dense = m.dense()
        assert dense.shape == (*(() if heads is None else (heads,)), *case.dims)
        columns = m(torch.eye(m.dim_in, dtype=F64))  # (dim_in, [H,] dim_out)
        torch.testing.assert_close(columns.movedim(0, -1), dense, **CLOSE)

    def test_adjoint_on_identity_is_dense(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        rows = m.adjoint(torch.eye(m.dim_out, dtype=F64))  # (dim_out, [H,] dim_in)
        torch.testing.assert_close(rows.movedim(0, -2), m.dense(), **CLOSE)

    @pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)], ids=str)
    def test_products_keep_the_batch_axes(self, case: Case, heads, normalize, batch):
        m = make(case, heads, normalize)
        x, y = vectors(*batch, m.dim_out), vectors(*batch, m.dim_in)
        lead = () if heads is None else (heads,)
        dense = stack(m, m.dense())
        expected = torch.einsum("hij,...j->...hi", dense, y).reshape(*batch, *lead, m.dim_out)
        torch.testing.assert_close(m(y), expected, **CLOSE)
        expected = torch.einsum("hij,...i->...hj", dense, x).reshape(*batch, *lead, m.dim_in)
        torch.testing.assert_close(m.adjoint(x), expected, **CLOSE)

    def test_features_and_bilinear_are_dense(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        x, y = vectors(4, 1, m.dim_out), vectors(3, m.dim_in)
        lead = () if heads is None else (heads,)
        assert m.left(x).shape == (4, 1, *lead, m.feature_dim)
        assert m.right(y).shape == (3, *lead, m.feature_dim)
        expected = torch.einsum("aoi,hij,bj->abh", x, stack(m, m.dense()), y).reshape(4, 3, *lead)
        torch.testing.assert_close((m.left(x) * m.right(y)).sum(-1), expected, **CLOSE)
        torch.testing.assert_close(m.bilinear(x, y), expected, **CLOSE)

    def test_strided_inputs(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        x, y = vectors(m.dim_out, 5).T, vectors(6, 5, m.dim_in).transpose(0, 1)[:, ::2]
        torch.testing.assert_close(m.left(x), m.left(x.contiguous()), **CLOSE)
        torch.testing.assert_close(m(y), m(y.contiguous()), **CLOSE)

    def test_as_mlbtc_is_the_same_matrix(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        random_state = torch.get_rng_state()
        twin = m.as_mlbtc()
        assert torch.equal(torch.get_rng_state(), random_state)
        assert type(twin) is MLBTC
        assert (twin.heads, twin.normalize) == (heads, False)
        torch.testing.assert_close(twin.dense(), m.dense(), **CLOSE)
        y = vectors(3, m.dim_in)
        torch.testing.assert_close(twin(y), m(y), **CLOSE)
        for parameter in m.parameters():
            torch.nn.init.zeros_(parameter)
        assert twin.dense().norm() > 0

    def test_random_member_has_the_bound_as_rank(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        assert m.rank_bound == case.rank
        sigma = torch.linalg.svdvals(m.dense())
        rank = (sigma > 1e-10 * sigma[..., :1]).sum(-1)
        assert (rank == case.rank).all()

    def test_flops_are_those_torch_counts(self, case: Case, heads, normalize):
        m = make(case, heads, normalize)
        dims = {"forward": m.dim_in, "right": m.dim_in, "adjoint": m.dim_out, "left": m.dim_out}
        for operation, dim in dims.items():
            with FlopCounterMode(display=False) as counter:
                getattr(m, operation)(vectors(7, dim))
            assert counter.get_total_flops() == 7 * m.flops_of(operation), operation
        assert m.flops == m.flops_of("forward")


@each_case
@each_heads
def test_numbers_of_the_table(case: Case, heads):
    m = make(case, heads)
    assert m.num_parameters == case.parameters * (heads or 1)
    assert m.num_parameters == sum(p.numel() for p in m.parameters())
    assert m.feature_dim == case.feature_dim
    assert sum(m.level_features) == m.feature_dim
    assert len(m.level_features) == (len(m.levels) if isinstance(m, MLBTC) else 1)


@each_case
@each_normalize
def test_a_stack_is_its_matrices_apart(case: Case, normalize):
    stacked = make(case, 3, normalize)
    with torch.no_grad():  # very different scales: a norm taken over all heads would show
        for parameter in stacked.parameters():
            parameter.mul_(torch.tensor([0.01, 1.0, 50.0], dtype=F64).reshape(3, *[1] * (parameter.dim() - 1)))
    for head in range(3):
        single = make(case, None, normalize)
        single.load_state_dict({name: value[head] for name, value in stacked.state_dict().items()})
        torch.testing.assert_close(single.dense(), stacked.dense()[head], **CLOSE)


@each_case
@each_normalize
def test_gradients(case: Case, normalize):
    m = make(case, 2, normalize)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in m.named_parameters()), strict=True)
    x, y = vectors(2, m.dim_out).requires_grad_(), vectors(2, m.dim_in).requires_grad_()

    def products(x, y, *values):
        class Call(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.m = m

            def forward(self, x, y):
                return m(y), m.adjoint(x), m.left(x), m.right(y)

        return functional_call(Call(), {f"m.{name}": v for name, v in zip(names, values, strict=True)}, (x, y))

    assert torch.autograd.gradcheck(products, (x, y, *values), fast_mode=True)


@each_case
def test_no_product_goes_through_dense(case: Case, monkeypatch):
    m = make(case, 2)
    monkeypatch.setattr(type(m), "dense", lambda self: pytest.fail("dense() was called"))
    x, y = vectors(3, m.dim_out), vectors(3, m.dim_in)
    m(y), m.adjoint(x), m.bilinear(x, y)


@each_case
@each_normalize
def test_state_dict_round_trip_and_deepcopy(case: Case, normalize):
    m, other = make(case, 2, normalize), make(case, 2, normalize, seed=5)
    assert not torch.equal(other.dense(), m.dense())
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.dense(), m.dense())
    twin = copy.deepcopy(m)
    assert torch.equal(twin.dense(), m.dense())
    with torch.no_grad():
        next(m.parameters()).add_(1.0)
    assert not torch.equal(twin.dense(), m.dense())


@each_case
def test_compiles_into_one_graph(case: Case):
    torch.compiler.reset()
    m = make(case, 2, normalize=True)
    x, y = vectors(3, m.dim_out), vectors(3, m.dim_in)

    def use(x, y):
        return m(y), m.adjoint(x), m.bilinear(x, y)

    torch.testing.assert_close(torch.compile(use, fullgraph=True, backend="eager")(x, y), use(x, y), **CLOSE)


@pytest.mark.parametrize("name", ["mlbtc-12x20", "kronecker-12x20", "butterfly-8"])
def test_compiles_forward_and_backward(name):
    torch.compiler.reset()
    m = make(CASES[name], 2, normalize=True)
    y = vectors(3, m.dim_in)
    gradients = []
    for call in (m, torch.compile(m, fullgraph=True, backend="aot_eager")):
        m.zero_grad()
        call(y).square().sum().backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(*gradients, **CLOSE)


@each_case
@each_heads
def test_the_description_makes_an_equal_structure(case: Case, heads):
    m = make(case, heads, normalize=True)
    again = eval(m.describe(), vars(structures))
    assert repr(again) == repr(m)
    assert "\n" not in repr(m)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in m.named_parameters()}


@each_case
def test_a_generator_decides_the_factors(case: Case):
    random_state = torch.get_rng_state()
    first, second = (case.make(generator=seeded(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    late = case.make(device="meta").to_empty(device="cpu")
    late.reset_parameters(seeded(3))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), late.parameters(), strict=True))


@each_case
def test_low_precision_and_autocast(case: Case):
    half = case.make(dtype=torch.bfloat16, heads=2, generator=seeded(0))
    full = case.make(dtype=torch.float32, heads=2, generator=seeded(0))
    full.load_state_dict(half.state_dict())
    y = torch.randn(4, half.dim_in, generator=seeded(1)).bfloat16()
    exact = full(y.float())
    scale = exact.square().mean().sqrt()
    assert half(y).dtype == torch.bfloat16
    assert ((half(y) - exact).square().mean().sqrt() / scale) < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = full(y.float())
    assert ((mixed - exact).square().mean().sqrt() / scale) < 0.03


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("heads", [None, 4])
def test_initial_scale(normalize, heads):
    """Unit inputs give features of order 1 (LowRank, MLR) or entries of `M y` of order 1 (the others)."""
    options = {"heads": heads, "normalize": normalize, "generator": seeded(0)}
    y = torch.randn(64, 256, generator=seeded(1))
    projections = [structures.LowRank(256, 256, 32, **options), structures.MLR(256, 256, (16, 8, 4, 4), **options)]
    chains = [
        structures.BTT(256, 256, **options),
        structures.BTT(256, 256, 2, **options),
        structures.Monarch(256, 256, 16, **options),
        structures.Kronecker(((16, 16), (16, 16)), **options),
        structures.Butterfly(256, **options),
    ]
    with torch.no_grad():
        features = [side(y) for m in projections for side in (m.left, m.right)]
        products = [m(y) for m in chains]
    for output in products:
        assert 0.6 < output.square().mean().sqrt() < 1.4
    for output in features:
        # Normalisation clips a projection to rms₀ < 1/sqrt(fan_in): to sqrt(r/fan_out), here 0.25 at the least.
        assert (0.2 if normalize else 0.7) < output.square().mean().sqrt() < 1.4
