"""project_: optima where there are closed forms, falling errors where there are none, members recovered."""

import math

import pytest
import torch

from structattn.structures import BTT, MLBTC, MLR, Butterfly, Kronecker, Level, LowRank, Monarch
from structattn.structures.kronecker import nearest_rank_one
from structattn.structures.peeling import peel
from structattn.structures.projection import nearest_levels
from tests.structures.cases import CASES, Case, each_case, make, relative_error, seeded

F64 = torch.float64
PLAIN = {"normalize": False, "dtype": F64}


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def noisy(clean: torch.Tensor, level: float, seed: int = 1) -> torch.Tensor:
    noise = matrix(*clean.shape, seed=seed)
    return clean + level * clean.norm() / noise.norm() * noise


@each_case
@pytest.mark.parametrize(("heads", "dtype"), [(None, F64), (2, torch.float32)], ids=["single", "heads"])
def test_a_member_is_recovered(case: Case, heads, dtype):
    member = make(case, heads, seed=4).to(dtype)
    other = make(case, heads, seed=9).to(dtype)
    target = member.dense().detach()
    assert relative_error(other.dense(), target) > 0.1
    assert other.project_(target) is other
    assert relative_error(other.dense(), target) < 1e-5


@each_case
def test_projection_leaves_at_most_the_noise_and_stays_put(case: Case):
    target = noisy(make(case, seed=3).dense().detach(), 0.5)
    m = make(case).project_(target)
    assert relative_error(m.dense(), target) < 0.5
    again = make(case, seed=2).project_(m.dense())
    # Levels that do not nest have no algebraic start, and descent need not recover this member exactly.
    exact = case is not CASES["mlbtc-12x20"]
    assert relative_error(again.dense(), m.dense()) < (1e-5 if exact else 0.01)


@each_case
def test_zero_is_projected_to_zero(case: Case):
    m = make(case).project_(torch.zeros(*case.dims))
    assert (m.dense() == 0).all()


def test_low_rank_meets_eckart_and_young():
    target = matrix(12, 20)
    m = LowRank(12, 20, 4, **PLAIN).project_(target)
    tail = torch.linalg.svdvals(target)[4:].norm()
    torch.testing.assert_close((m.dense() - target).norm(), tail, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("m", "a", "b", "c", "d", "s"),
    [
        (BTT(16, 16, **PLAIN), 4, 4, 4, 4, 1),
        (BTT(12, 20, 2, **PLAIN), 3, 4, 4, 5, 2),
        (BTT(12, 20, 1, ((6, 2), (2, 10)), **PLAIN), 6, 2, 2, 10, 1),
        (Monarch(16, 16, 4, **PLAIN), 4, 4, 4, 4, 1),
        (Monarch(12, 20, 2, **PLAIN), 2, 6, 2, 10, 1),
        (MLBTC([Level(3, 4, 4, 5, 2, weight=-0.5)], **PLAIN), 3, 4, 4, 5, 2),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
def test_tile_wise_optimum(m, a, b, c, d, s):
    target = matrix(m.dim_out, m.dim_in)
    m.project_(target)
    tails = []
    for i_b in range(b):
        for i_c in range(c):  # rows of a tile: every b-th, from i_b; columns: a run of d
            tile = target[i_b::b, i_c * d : (i_c + 1) * d]
            assert tile.shape == (a, d)
            tails.append(torch.linalg.svdvals(tile)[s:])
    torch.testing.assert_close((m.dense() - target).norm(), torch.cat(tails).norm(), rtol=1e-12, atol=0)


def test_two_factor_kronecker_meets_the_rearranged_svd():
    target = matrix(12, 20)
    m = Kronecker(((3, 4), (4, 5)), **PLAIN).project_(target)
    rows = [target[i * 4 : i * 4 + 4, j * 5 : j * 5 + 5].flatten() for i in range(3) for j in range(4)]
    tail = torch.linalg.svdvals(torch.stack(rows))[1:].norm()
    torch.testing.assert_close((m.dense() - target).norm(), tail, rtol=1e-12, atol=0)


def test_rank_one_fit_is_stationary_and_no_worse_than_its_start():
    tensor = matrix(3, 4, 5)
    start = nearest_rank_one(tensor, max_sweeps=0)
    vectors = [v.requires_grad_() for v in nearest_rank_one(tensor, max_sweeps=500)]

    def error(u, v, w):
        return (tensor - torch.einsum("i,j,k->ijk", u, v, w)).norm()

    assert error(*vectors) < error(*start)
    gradients = torch.autograd.grad(error(*vectors) ** 2, vectors)
    assert max(g.abs().max().item() for g in gradients) < 1e-4


def test_butterfly_recovers_a_hadamard_matrix_and_degrades_with_noise():
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
    target = step
    for _ in range(3):
        target = torch.kron(target, step)
    m = Butterfly(16, **PLAIN)
    assert relative_error(m.project_(target).dense(), target) < 1e-12
    rough = noisy(target, 0.01)
    assert relative_error(m.project_(rough).dense(), rough) < 0.012


# The ranks determine each level, so that peeling recovers them; from zero, descent stalls on most of these.
MLR_SHAPES = [
    ((16, 16), (2, 1, 1), None),
    ((16, 16), (4, 2, 1), None),
    ((64, 64), (8, 4, 2, 2), None),
    ((64, 64), (4, 4, 4, 4), None),
    ((12, 20), (2, 1, 1), None),
    ((48, 48), (4, 2, 1), (1, 2, 6)),
    ((36, 36), (3, 2), (1, 3)),
    ((128, 128), (16, 8, 4, 4), None),
]


@pytest.mark.parametrize(("dims", "ranks", "blocks"), MLR_SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_mlr_members_are_recovered(dims, ranks, blocks, seed):
    member = MLR(*dims, ranks, blocks, generator=seeded(seed), **PLAIN)
    target = member.dense().detach()
    assert relative_error(sum(peel(target, member.levels)), target) < 1e-10
    fitted = MLR(*dims, ranks, blocks, **PLAIN).project_(target)
    assert relative_error(fitted.dense(), target) < 1e-5


@pytest.mark.parametrize(("dims", "ranks", "blocks"), MLR_SHAPES[:-1], ids=str)
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_mlr_error_falls_and_beats_low_rank_of_the_same_size(dims, ranks, blocks, noise):
    clean = MLR(*dims, ranks, blocks, generator=seeded(3), **PLAIN)
    target = noisy(clean.dense().detach(), noise)
    fit = nearest_levels(target, clean.levels, max_sweeps=60)
    errors = torch.tensor(fit.errors, dtype=F64)
    assert (errors.diff() <= 0).all()
    fitted = MLBTC.from_factors(clean.levels, *zip(*fit.factors, strict=True))
    assert relative_error(fitted.dense(), target) == pytest.approx(fit.errors[-1], rel=1e-9)
    low_rank = LowRank(*dims, sum(ranks), **PLAIN).project_(target)
    assert low_rank.num_parameters == clean.num_parameters
    assert fit.errors[-1] < relative_error(low_rank.dense(), target)
    if ranks != (4, 4, 4, 4):  # ranks fill its blocks, so descent converges slowly under noise
        assert fit.errors[-1] < noise


def test_mlr_of_a_matrix_without_structure_improves_on_one_sweep():
    target = matrix(32, 32)
    levels = MLR(32, 32, (4, 2, 1)).levels
    one, many = (nearest_levels(target, levels, max_sweeps=n).errors[-1] for n in (1, 60))
    assert many < one < 1


@pytest.mark.parametrize(
    "levels",
    [
        [Level(4, 4, 4, 4), Level.low_rank(16, 16, 2)],
        [Level.low_rank(16, 16, 2), Level(4, 4, 4, 4)],
        [Level.low_rank(32, 32, 3), Level(4, 4, 4, 4, blocks=2, weight=0.5)],
        [Level.low_rank(12, 12, 1, 2), Level.low_rank(12, 12, 1, 3)],
        [Level(3, 4, 4, 5), Level.low_rank(12, 20, 1)],
    ],
    ids=["btt+lowrank", "lowrank+btt", "lowrank+btts", "not nested", "12x20"],
)
@pytest.mark.parametrize("seed", range(2))
def test_sums_of_other_levels_are_recovered(levels, seed):
    target = MLBTC(levels, generator=seeded(seed), **PLAIN).dense().detach()
    fitted = MLBTC(levels, **PLAIN).project_(target)
    assert relative_error(fitted.dense(), target) < 1e-5


def test_rank_above_the_dims_and_rank_deficient_targets():
    target = matrix(7, 1) @ matrix(1, 11, seed=1)
    m = LowRank(7, 11, 9, **PLAIN).project_(target)
    torch.testing.assert_close(m.dense(), target)
    assert all(p.isfinite().all() for p in m.parameters())


def test_projection_keeps_dtype_and_grad_flags():
    m = BTT(16, 16, normalize=False, dtype=torch.bfloat16)
    target = matrix(16, 16).requires_grad_()
    m.project_(target)
    assert m.left_1.dtype == torch.bfloat16
    assert m.left_1.requires_grad
    assert m.left_1.grad_fn is None
    exact = BTT(16, 16, **PLAIN).project_(target)
    assert relative_error(m.dense().double(), exact.dense()) < 0.01
    assert math.isfinite(m.dense().sum().item())
