from __future__ import annotations

import math

import pytest
import torch

from structattn.tasks import RegressionConfig, RegressionTask, build_task
from structattn.tasks.regression_baselines import least_squares_error, ridge_error, zero_error
from tests.tasks.battery import TaskBattery, joined


def make(dim: int = 6, prompts: int = 10, steps: int = 100, seed: int = 0, curriculum: float = 0.06) -> RegressionTask:
    config = RegressionConfig(input_dim=dim, evaluation_prompts=prompts, curriculum=curriculum)
    return RegressionTask(config, seed=seed, total_steps=steps)


def points(batch):
    return batch["inputs"][:, 0::2], batch["targets"]


class TestRegressionTask(TaskBattery):
    def make(self, seed=0):
        return make(seed=seed)

    def outputs(self, batch):
        return batch["inputs"].sum(dim=-1) / 2


def test_tokens_interleave_x_and_padded_y():
    batch = make(dim=5).batch(99, 3)
    assert batch["inputs"].shape == (3, 20, 5)
    assert batch["targets"].shape == (3, 10)
    assert torch.equal(batch["inputs"][:, 1::2, 0], batch["targets"])
    assert (batch["inputs"][:, 1::2, 1:] == 0).all()
    assert (batch["inputs"][:, 0::2] != 0).all()


def test_one_weight_explains_a_whole_prompt_and_prompts_have_their_own():
    x, y = points(make(dim=5).batch(99, 8))
    weights = torch.linalg.lstsq(x.double(), y.double()[..., None]).solution
    torch.testing.assert_close(x.double() @ weights, y.double()[..., None], rtol=0, atol=1e-5)
    assert torch.pdist(weights[..., 0]).min() > 0.1


def test_inputs_and_weights_are_standard_normal():
    batch = joined(list(make(dim=8, prompts=2000).evaluation_batches(500)))
    x, y = points(batch)
    weights = torch.linalg.lstsq(x.double(), y.double()[..., None]).solution[..., 0]
    for sample in (x.double().flatten(), weights.flatten()):
        assert abs(sample.mean()) < 5 / math.sqrt(len(sample))
        assert abs(sample.square().mean() - 1) < 5 * math.sqrt(2 / len(sample))
        assert abs(sample.pow(4).mean() - 3) < 5 * math.sqrt(96 / len(sample))
    covariance = torch.einsum("bi,bj->ij", weights, weights) / len(weights)
    assert (covariance - torch.eye(8)).abs().max() < 6 * math.sqrt(2 / len(weights))


def test_curriculum_climbs_in_equal_steps_over_its_share_of_the_run():
    task = make(dim=8, steps=400, curriculum=0.1)
    dimensions = [task.dimension(step) for step in range(50)]
    assert dimensions == sorted([4, 5, 6, 7] * 10 + [8] * 10)
    assert [task.sequence_length(step) for step in (0, 10, 40, 399)] == [16, 20, 32, 32]
    assert task.context_length == 32


def test_curriculum_zeroes_coordinates_and_shortens_the_prompt():
    task = make(dim=8, steps=400, curriculum=0.1)
    batch = task.batch(10, 3)
    assert batch["inputs"].shape == (3, 20, 8)
    assert batch["targets"].shape == (3, 10)
    assert (batch["inputs"][..., 5:] == 0).all()
    x, y = points(batch)
    assert (x[..., :5] != 0).all()
    weights = torch.linalg.lstsq(x[..., :5].double(), y.double()[..., None]).solution
    torch.testing.assert_close(x[..., :5].double() @ weights, y.double()[..., None], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "curriculum", "first"), [(16, 0.06, 4), (16, 0.0, 16), (4, 0.5, 4), (3, 0.5, 3), (1, 0.5, 1)]
)
def test_where_the_curriculum_begins(dim, curriculum, first):
    task = make(dim=dim, curriculum=curriculum)
    assert task.dimension(0) == first
    assert task.dimension(99) == dim
    assert task.batch(0, 2)["targets"].shape == (2, 2 * first)


def test_curriculum_of_the_paper_takes_six_percent_of_the_run():
    task = make(dim=16, steps=500_000)
    assert task.curriculum_steps == 30_000
    assert task.dimension(29_999) == 15
    assert task.dimension(30_000) == 16


def test_more_dimensions_than_curriculum_steps_are_climbed_in_larger_steps():
    task = make(dim=64, steps=100)
    assert [task.dimension(step) for step in range(7)] == [4, 14, 24, 34, 44, 54, 64]


def test_loss_by_hand():
    task = make(dim=2, curriculum=0.0)
    batch = {"inputs": torch.zeros(1, 8, 2), "targets": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    # Only the numbers at the x count: errors 1, 0, 2, 4 and squares 1, 0, 4, 16, over 4 points and 2 dimensions.
    outputs = torch.tensor([[2.0, 99.0, 2.0, 99.0, 1.0, 99.0, 0.0, 99.0]])
    assert task.loss(outputs, batch).item() == pytest.approx(21 / 8)
    metrics = task.metrics(task.totals(outputs, batch))
    assert metrics["error_by_position"] == pytest.approx([0.5, 0.0, 2.0, 8.0])
    assert metrics["last_error"] == pytest.approx(8.0)
    assert metrics["mean_error"] == pytest.approx(21 / 8)


def test_zero_predictor_agrees_with_its_baseline():
    task = make(dim=5, prompts=40)
    batch = next(task.evaluation_batches(40))
    metrics = task.metrics(task.totals(torch.zeros(40, 20), batch))
    assert metrics["error_by_position"] == pytest.approx(zero_error(task).tolist())
    torch.testing.assert_close(zero_error(make(dim=5, prompts=4000)), torch.ones(10).double(), rtol=0, atol=0.2)


def explicit_error(task, solve):
    """Compute the baseline by definition: a new fit to the points before each point."""
    x, y = (part.double() for part in points(next(task.evaluation_batches(1000))))
    errors = [y[:, 0].square()]
    for i in range(1, y.shape[1]):
        prediction = (solve(x[:, :i], y[:, :i, None])[..., 0] * x[:, i]).sum(dim=-1)
        errors.append((y[:, i] - prediction).square())
    return torch.stack(errors, dim=1).mean(dim=0) / x.shape[-1]


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_least_squares_is_the_one_of_least_norm(dim):
    task = make(dim=dim, prompts=50)
    expected = explicit_error(task, lambda x, y: torch.linalg.pinv(x) @ y)
    torch.testing.assert_close(least_squares_error(task), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 30.0])
def test_ridge_solves_the_normal_equations(penalty):
    task = make(dim=5, prompts=50)
    identity = torch.eye(5).double()
    expected = explicit_error(task, lambda x, y: torch.linalg.solve(x.mT @ x + penalty * identity, x.mT @ y))
    torch.testing.assert_close(ridge_error(task, penalty), expected, rtol=1e-8, atol=1e-10)


def test_least_squares_error_matches_theory():
    dim, prompts = 8, 3000
    error = least_squares_error(make(dim=dim, prompts=prompts))
    expected = torch.tensor([1 - i / dim for i in range(dim)]).double()
    # A residual is normal; its variance is |w|² over the unseen dimensions. Its square deviates by at most ~2.
    torch.testing.assert_close(error[:dim], expected, rtol=0, atol=5 * 2 / math.sqrt(prompts))
    assert error[dim:].max() < 1e-7
    assert len(error) == 2 * dim


def test_ridge_goes_to_least_squares_and_to_zero():
    task = make(dim=6, prompts=50)
    torch.testing.assert_close(ridge_error(task, 1e-9), least_squares_error(task), rtol=0, atol=1e-5)
    torch.testing.assert_close(ridge_error(task, 1e9), zero_error(task), rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan")])
def test_bad_penalty_is_refused(penalty):
    with pytest.raises(ValueError, match="penalty must be"):
        ridge_error(make(), penalty)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("input_dim", 0, ValueError),
        ("input_dim", 2.0, TypeError),
        ("curriculum", 1.0, ValueError),
        ("curriculum", -0.1, ValueError),
        ("curriculum", "slow", TypeError),
        ("evaluation_prompts", 0, ValueError),
    ],
)
def test_bad_configs_are_refused(field, value, error):
    with pytest.raises(error, match=f"{field} must be"):
        RegressionConfig(**{field: value})


def test_bad_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="total_steps must be a positive integer, got 0"):
        RegressionTask(RegressionConfig(), total_steps=0)


def test_build_task():
    task = build_task(RegressionConfig(input_dim=5), seed=3, total_steps=1000)
    assert isinstance(task, RegressionTask)
    assert (task.seed, task.curriculum_steps) == (3, 60)
    with pytest.raises(
        TypeError, match="config must be a LanguageConfig, RegressionConfig or ForecastConfig, got dict"
    ):
        build_task({}, total_steps=1)
