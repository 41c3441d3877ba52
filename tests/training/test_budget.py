import pytest

from structattn.tasks import RegressionConfig
from structattn.training.budget import evaluation_interval, plan_steps
from tests.training.tiny import make_config, make_task


def cost(length):
    return 10 * length + length**2


def never(task):
    raise AssertionError("only a budget of minutes measures time")


def plan(make_task=make_task, **budget):
    return plan_steps(make_config(**{"steps": None} | budget), make_task, cost, never)


def total(steps, cost, task=make_task):
    """Add up the cost of a run step by step."""
    made = task(steps)
    return 4 * sum(cost(made.sequence_length(step)) for step in range(steps))


def test_steps_are_steps():
    assert plan(steps=7) == 7


@pytest.mark.parametrize("tokens", [96, 1000, 5000, 123_456])
def test_token_budgets_are_spent_to_within_a_step(tokens):
    steps = plan(tokens=tokens)
    assert total(steps, lambda length: length) <= tokens
    assert total(steps + 1, lambda length: length) > tokens


@pytest.mark.parametrize("flops", [4e3, 1e5, 1e6, 3.3e7])
def test_flop_budgets_are_spent_to_within_a_step(flops):
    steps = plan(flops=flops)
    assert total(steps, cost) <= flops
    assert total(steps, cost) > flops - 4 * cost(24)


def test_without_a_curriculum_steps_are_budget_over_step_cost():
    def flat(steps):
        return make_task(steps, RegressionConfig(input_dim=6, curriculum=0.0))

    assert plan(flat, flops=1e9) == int(1e9 // (4 * cost(24)))


def test_minutes_are_estimated():
    config = make_config(steps=None, minutes=2.0)
    assert plan_steps(config, make_task, cost, lambda task: 0.5) == 240
    assert plan_steps(config, make_task, cost, lambda task: 1e6) == 1


@pytest.mark.parametrize("budget", [{"tokens": 95}, {"flops": 100.0}])
def test_a_budget_below_one_step(budget):
    with pytest.raises(
        ValueError, match=f"{next(iter(budget))} must be at least .*, the cost of one step of this model, got"
    ):
        plan(**budget)


def test_evaluation_interval():
    assert evaluation_interval(make_config(evaluation_interval=7), 1000, 1e6) == 7
    automatic = make_config(evaluation_interval=None)
    assert evaluation_interval(automatic, 1000, 0.5) == 50  # cheap: twenty of them
    assert evaluation_interval(automatic, 1000, 8.0) == 200  # 4% of the run pays for five
    assert evaluation_interval(automatic, 1000, 1e6) == 1000  # always one, at the end
