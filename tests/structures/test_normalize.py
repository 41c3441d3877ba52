"""The weight normalisation: W / max(1, rms(W)/rms₀), in one place, per head, over the blocks of a factor."""

import math

import pytest
import torch

from structattn.structures import BTT, MLBTC, MLR, Butterfly, Kronecker, Level, LowRank, Monarch
from tests.structures.cases import Case, each_case, make

F64 = torch.float64


def rms(weight: torch.Tensor) -> torch.Tensor:
    return weight.square().mean(tuple(range(1, weight.dim()))).sqrt()


@each_case
def test_factors_are_bounded_and_small_ones_left_alone(case: Case):
    m = make(case, heads=3, normalize=True)
    for name, (fan_in, fan_out) in m.factor_fans().items():
        bound = math.sqrt(min(fan_in, fan_out)) / fan_in
        weight = getattr(m, name)
        scales = torch.tensor([0.5, 1.0, 40.0], dtype=F64) * bound / rms(weight.detach())
        with torch.no_grad():
            weight.mul_(scales.reshape(3, *[1] * (weight.dim() - 1)))
        used = m.factor(name)
        torch.testing.assert_close(rms(used), torch.tensor([0.5, 1.0, 1.0], dtype=F64) * bound)
        torch.testing.assert_close(used[0], weight[0])
        torch.testing.assert_close(used[2], weight[2] / 40)


@each_case
def test_plain_factors_are_used_as_they_are(case: Case):
    m = make(case, heads=2, normalize=False)
    for name, parameter in m.named_parameters():
        assert m.factor(name) is parameter


@each_case
def test_fans_name_every_parameter(case: Case):
    m = make(case)
    assert list(m.factor_fans()) == [name for name, _ in m.named_parameters()]


@each_case
def test_zero_weights_have_finite_gradients(case: Case):
    m = make(case, heads=2, normalize=True)
    for parameter in m.parameters():
        torch.nn.init.zeros_(parameter)
    m(torch.ones(3, m.dim_in, dtype=F64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in m.parameters())


@pytest.mark.parametrize(
    ("structure", "fans"),
    [
        (LowRank(64, 32, 8), {"left_1": (64, 8), "right_1": (32, 8)}),
        (
            MLR(64, 32, (8, 4), heads=2),
            {"left_1": (64, 8), "right_1": (32, 8), "left_2": (32, 4), "right_2": (16, 4)},
        ),
        (BTT(64, 32, 3, ((4, 16), (8, 4))), {"left_1": (24, 4), "right_1": (4, 48)}),
        (Monarch(64, 32, 4), {"left_1": (4, 4), "right_1": (8, 16)}),
        (Kronecker(((4, 2), (3, 5))), {"factor_1": (2, 4), "factor_2": (5, 3)}),
        (Butterfly(4), {"factor_1": (2, 2), "factor_2": (2, 2)}),
        (MLBTC([Level(2, 3, 2, 5, 2, blocks=2)]), {"left_1": (4, 2), "right_1": (5, 6)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fans_of_one_block(structure, fans):
    assert structure.factor_fans() == fans
