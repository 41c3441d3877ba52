"""From a budget to a number of steps, so that the learning rate and the curriculum know where they end."""

from __future__ import annotations

import math
from collections.abc import Callable

from structattn.tasks import Task
from structattn.training.config import TrainConfig

MakeTask = Callable[[int], Task]
"""The task of a run of so many steps, such as `lambda steps: build_task(config, total_steps=steps)`."""

_MOST_EVALUATIONS = 20
_EVALUATION_SHARE = 0.04


def plan_steps(
    config: TrainConfig,
    make_task: MakeTask,
    training_flops: Callable[[int], int],
    seconds_per_step: Callable[[Task], float],
) -> int:
    """Steps that `config`'s budget allows, the last of them within it; an estimate where it counts minutes.

    Args:
        config: the budget.
        make_task: the task, whose sequences may be shorter in the first steps of a run.
        training_flops: FLOPs of one training sequence of a given length.
        seconds_per_step: measures a step of a task; called where the budget counts minutes.

    Raises:
        ValueError: the budget does not allow a single step.
    """
    if config.steps is not None:
        return config.steps
    if config.minutes is not None:
        return max(1, round(60 * config.minutes / seconds_per_step(make_task(1))))
    if config.tokens is not None:
        return _steps_within("tokens", config.tokens, config.batch_size, make_task, lambda length: length)
    if config.flops is not None:
        return _steps_within("flops", config.flops, config.batch_size, make_task, training_flops)
    raise ValueError("the config has no budget")


def evaluation_interval(config: TrainConfig, total_steps: int, evaluation_cost: float) -> int:
    """Steps between evaluations: as the config says, or at most 20 of them and at most 4% of the run's compute.

    Args:
        config: the interval, if it is fixed.
        total_steps: steps of the run.
        evaluation_cost: FLOPs of an evaluation over those of a training step, above 0.
    """
    if config.evaluation_interval is not None:
        return config.evaluation_interval
    affordable = int(_EVALUATION_SHARE * total_steps / evaluation_cost)
    return math.ceil(total_steps / min(max(affordable, 1), _MOST_EVALUATIONS))


def _steps_within(name: str, budget: float, batch_size: int, make_task: MakeTask, cost: Callable[[int], int]) -> int:
    """The most steps whose sequences cost at most `budget` in all.

    Begins with what full-length sequences would allow, and adds what a curriculum of shorter ones leaves over:
    a run of more steps spends at most a full-length step on each of them.
    """
    step_cost = batch_size * cost(make_task(1).context_length)
    steps = int(budget // step_cost)
    if steps < 1:
        raise ValueError(
            f"{name} must be at least {step_cost:.3g}, what one step of this model takes; got {budget:.3g}"
        )
    while True:
        task = make_task(steps)
        left = budget - batch_size * total_cost(task, cost, 0, steps - 1)
        if left < step_cost:
            return steps
        steps += int(left // step_cost)


def total_cost(task: Task, cost: Callable[[int], int], first: int, last: int) -> int:
    """Cost of one sequence of every step from `first` to `last`; lengths never shrink as a run goes on."""
    length = task.sequence_length(first)
    if length == task.sequence_length(last):
        return (last - first + 1) * cost(length)
    middle = (first + last) // 2
    return total_cost(task, cost, first, middle) + total_cost(task, cost, middle + 1, last)
