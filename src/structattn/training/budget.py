"""Turn a budget into steps, which schedule and curriculum need in advance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from structattn.tasks import Task
from structattn.training.config import TrainConfig

if TYPE_CHECKING:
    from structattn.models import StructuredModel

MakeTask = Callable[[int], Task]
"""Makes the task from the run's number of steps: `lambda steps: build_task(config, total_steps=steps)`."""

_MAX_EVALUATIONS = 20
_MAX_EVALUATION_SHARE = 0.04


def plan_steps(
    config: TrainConfig,
    make_task: MakeTask,
    training_flops: Callable[[int], int],
    seconds_per_step: Callable[[Task], float],
) -> int:
    """Return the steps that fit in the budget; estimated for minutes.

    Args:
        config: the budget.
        make_task: makes the task, whose first steps may have shorter sequences.
        training_flops: FLOPs of one training sequence of a given length.
        seconds_per_step: times a step of a task; called only if the budget counts minutes.

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
    """Return the steps between evaluations.

    By default there are at most 20 evaluations, and at least one; together they cost at most 4% of the run's compute.

    Args:
        config: may set the interval.
        total_steps: steps of the run.
        evaluation_cost: FLOPs of an evaluation divided by those of a training step, above 0.
    """
    if config.evaluation_interval is not None:
        return config.evaluation_interval
    affordable = int(_MAX_EVALUATION_SHARE * total_steps / evaluation_cost)
    return math.ceil(total_steps / min(max(affordable, 1), _MAX_EVALUATIONS))


def evaluation_cost(task: Task, batch_size: int, model: StructuredModel) -> float:
    """Return an evaluation's FLOPs over those of a full-length training step."""
    cost = model.flops(task.context_length)
    return task.evaluation_size * cost.forward / (batch_size * cost.training)


def _steps_within(name: str, budget: float, batch_size: int, make_task: MakeTask, cost: Callable[[int], int]) -> int:
    """Return the largest number of steps that costs at most `budget`.

    Starts from the number for full-length sequences. A curriculum of shorter ones leaves some budget over; each
    further step costs at most a full-length one, so as many are added as the rest pays for.
    """
    step_cost = batch_size * cost(make_task(1).context_length)
    steps = int(budget // step_cost)
    if steps < 1:
        raise ValueError(
            f"{name} must be at least {step_cost:.3g}, the cost of one step of this model, got {budget:.3g}"
        )
    while True:
        task = make_task(steps)
        left = budget - batch_size * total_cost(task, cost, 0, steps - 1)
        if left < step_cost:
            return steps
        steps += int(left // step_cost)


def total_cost(task: Task, cost: Callable[[int], int], first: int, last: int) -> int:
    """Sum the cost of one sequence per step; lengths never shrink."""
    length = task.sequence_length(first)
    if length == task.sequence_length(last):
        return (last - first + 1) * cost(length)
    middle = (first + last) // 2
    return total_cost(task, cost, first, middle) + total_cost(task, cost, middle + 1, last)
