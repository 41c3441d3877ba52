"""Each family against its textbook definition, written out another way than in the library."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from structattn.structures import BTT, MLBTC, MLR, Butterfly, Kronecker, Level, LowRank, Monarch
from tests.structures.cases import seeded

F64 = torch.float64
PLAIN = {"normalize": False, "dtype": F64}


def regroup(*axes: int, order: tuple[int, ...]) -> torch.Tensor:
    """The permutation matrix that regroups an index `axes` into the given order of its parts."""
    size = math.prod(axes)
    return torch.eye(size, dtype=F64)[torch.arange(size).reshape(axes).permute(order).flatten()]


def test_low_rank():
    m = LowRank(5, 7, 3, **PLAIN)
    torch.testing.assert_close(m.dense(), m.left_1[0] @ m.right_1[0].T)


def test_btt():
    m = BTT(12, 20, rank=2, factors=((3, 4), (2, 10)), **PLAIN)
    b, c, s, a = 4, 2, 2, 3
    left, right = torch.block_diag(*m.left_1), torch.block_diag(*(block.T for block in m.right_1))
    p_right = regroup(c, b, s, order=(1, 0, 2))
    p_left = regroup(b, a, order=(1, 0))
    torch.testing.assert_close(m.dense(), p_left @ left @ p_right @ right)


@pytest.mark.parametrize(
    ("dim", "small", "large"), [(256, 16, 16), (512, 16, 32), (12, 3, 4), (20, 4, 5), (7, 1, 7), (1, 1, 1), (48, 6, 8)]
)
def test_btt_default_factors(dim, small, large):
    assert BTT(dim, dim).factors == ((small, large), (small, large))


def test_btt_costs_of_the_paper():
    m = BTT(256, 256, 3)
    assert m.num_parameters == 2 * 256 * 16 * 3


def test_mlr():
    m = MLR(12, 20, (3, 2, 1), **PLAIN)
    expected = sum(
        torch.block_diag(*(left @ right.T for left, right in zip(lefts, rights, strict=True)))
        for lefts, rights in ((m.left_1, m.right_1), (m.left_2, m.right_2), (m.left_3, m.right_3))
    )
    torch.testing.assert_close(m.dense(), expected)
    assert m.blocks == (1, 2, 4)
    assert m.level_features == (3, 4, 4)


def test_monarch_is_p_l_p_r():
    n, blocks = 24, 4
    m = Monarch(n, n, blocks, **PLAIN)
    right = torch.block_diag(*(block.T for block in m.right_1))  # 4 blocks of 6 x 6
    left = torch.block_diag(*m.left_1)  # 6 blocks of 4 x 4
    p = regroup(blocks, n // blocks, order=(1, 0))
    torch.testing.assert_close(m.dense(), p.T @ left @ p @ right)


def test_monarch_of_root_blocks_is_a_btt():
    monarch, btt = Monarch(16, 16, 4, **PLAIN), BTT(16, 16, **PLAIN)
    btt.load_state_dict(monarch.state_dict())
    assert torch.equal(monarch.dense(), btt.dense())


def test_kronecker():
    m = Kronecker(((3, 2), (2, 4), (2, 5)), **PLAIN)
    torch.testing.assert_close(m.dense(), torch.kron(torch.kron(m.factor_1, m.factor_2), m.factor_3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_kronecker_applies_factors_in_the_cheapest_order(shapes):
    def cost(order: tuple[int, ...]) -> int:
        sizes, total = [n for _, n in shapes], 0
        for i in order:
            total += 2 * math.prod(sizes) * shapes[i][0]
            sizes[i] = shapes[i][0]
        return total

    assert Kronecker(shapes).flops == min(cost(order) for order in itertools.permutations(range(len(shapes))))


def test_kronecker_of_square_factors_leaves_the_queries_alone():
    m = Kronecker(((2, 2), (3, 3)), heads=2)
    x = torch.randn(5, 6)
    assert torch.equal(m.left(x), x.unsqueeze(-2).expand(5, 2, 6))
    assert m.flops_of("left") == 0


def test_butterfly_factors_have_the_pattern_of_the_fast_fourier_transform():
    m = Butterfly(16, **PLAIN)
    product = torch.eye(16, dtype=F64)
    for stage in range(1, 5):
        stride = 2 ** (stage - 1)
        factor = m._product([stage])[0]
        i, j = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        assert torch.equal(factor != 0, (i == j) | (i == j ^ stride))
        product = factor @ product
    torch.testing.assert_close(m.dense(), product)


def test_butterfly_holds_the_hadamard_matrix():
    m = Butterfly(8, **PLAIN)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.copy_(step.expand_as(parameter))
    torch.testing.assert_close(m.dense(), torch.kron(step, torch.kron(step, step)))


def test_level_entry_for_entry():
    level = Level(a=2, b=3, c=2, d=2, s=2, blocks=2, weight=-0.5)
    m = MLBTC([level], **PLAIN)
    left, right = m.left_1.reshape(2, 3, 2, 2, 2), m.right_1.reshape(2, 2, 2, 3, 2)
    expected = torch.zeros(2, 2, 3, 2, 2, 2, dtype=F64)  # (g, i_a, i_b), (g', i_c, i_d)
    for g in range(2):
        for i_a in range(2):
            for i_b in range(3):
                for i_c in range(2):
                    for i_d in range(2):
                        expected[g, i_a, i_b, g, i_c, i_d] = -0.5 * left[g, i_b, i_a, i_c] @ right[g, i_c, i_d, i_b]
    torch.testing.assert_close(m.dense(), expected.reshape(12, 8))


def test_slices_of_the_features_are_the_levels():
    m = MLR(12, 20, (3, 2, 1), heads=2, **PLAIN)
    x, y = torch.randn(5, 12, dtype=F64), torch.randn(5, 20, dtype=F64)
    slices = zip(m.left(x).split(m.level_features, -1), m.right(y).split(m.level_features, -1), strict=True)
    for number, (left, right) in enumerate(slices, start=1):
        factors = [[m.get_parameter(f"{side}_{number}")] for side in ("left", "right")]
        alone = MLBTC.from_factors([m.levels[number - 1]], *factors, heads=2)
        torch.testing.assert_close((left * right).sum(-1), alone.bilinear(x, y))


@st.composite
def levels_of_equal_shape(draw) -> list[Level]:
    dim_out, dim_in = draw(st.sampled_from([(12, 20), (16, 16), (6, 6), (7, 11), (8, 4), (1, 3)]))
    levels = []
    for _ in range(draw(st.integers(1, 3))):
        blocks = draw(st.sampled_from([p for p in range(1, 9) if dim_out % p == 0 and dim_in % p == 0]))
        a = draw(st.sampled_from([k for k in range(1, dim_out + 1) if dim_out // blocks % k == 0]))
        c = draw(st.sampled_from([k for k in range(1, dim_in + 1) if dim_in // blocks % k == 0]))
        s, weight = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, -0.25, 3.0]))
        levels.append(Level(a, dim_out // blocks // a, c, dim_in // blocks // c, s, blocks, weight))
    return levels


@settings(max_examples=60, deadline=None)
@given(levels_of_equal_shape(), st.sampled_from([None, 2]), st.booleans(), st.integers(0, 100))
def test_any_levels(levels, heads, normalize, seed):
    m = MLBTC(levels, heads=heads, normalize=normalize, dtype=F64, generator=seeded(seed))
    x, y = torch.randn(3, m.dim_out, dtype=F64), torch.randn(3, m.dim_in, dtype=F64)
    dense = m.dense() if heads else m.dense().unsqueeze(0)
    expected = torch.einsum("ni,hij,nj->nh", x, dense, y)
    close = {"rtol": 1e-9, "atol": 1e-10 * float(dense.detach().norm() + 1)}
    torch.testing.assert_close(m.bilinear(x, y).reshape(3, -1), expected, **close)
    torch.testing.assert_close((x.unsqueeze(1) * m(y).reshape(3, -1, m.dim_out)).sum(-1), expected, **close)
    torch.testing.assert_close((m.adjoint(x).reshape(3, -1, m.dim_in) * y.unsqueeze(1)).sum(-1), expected, **close)
    with FlopCounterMode(display=False) as counter:
        m(y)
    assert counter.get_total_flops() == 3 * m.flops
    assert m.num_parameters == sum(p.numel() for p in m.parameters())
    sigma = torch.linalg.svdvals(dense)
    assert ((sigma > 1e-11 * sigma[:, :1]).sum(-1) <= m.rank_bound).all()
