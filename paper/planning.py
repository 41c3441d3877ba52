"""Estimate parameters, steps, FLOPs and time of a study before it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from paper.chronos.run import ChronosRunConfig
from paper.study import Trial
from paper.workers import threads_per_job
from structattn.comparison.numbers import magnitude
from structattn.comparison.run import RunConfig
from structattn.models import StructuredModel
from structattn.reporting.terminal import terminal_table
from structattn.tasks import Task
from structattn.training.budget import plan_steps, total_cost
from structattn.training.evaluation import predict

_TIMED_ROWS = 4
_Config = RunConfig | ChronosRunConfig


@dataclass(frozen=True)
class Cost:
    """Cost of one trial on this machine."""

    parameters: int
    steps: int
    flops: float
    """Training FLOPs."""
    seconds: float
    """Estimated time."""


@dataclass(frozen=True)
class Plan:
    """A trial and its cost."""

    trial: Trial
    cost: Cost


def plan(trials: Sequence[Trial], jobs: int = 1) -> list[Plan]:
    """Estimate the cost of every trial.

    Trials that differ only in seed or learning rate are timed once.

    Args:
        trials: the trials.
        jobs: number of trials at a time; they share the cores.

    Raises:
        TypeError, ValueError: a trial cannot be built.
    """
    known: dict[str, Cost] = {}
    plans = []
    for trial in trials:
        key = str(without_seed_and_rate(trial.config))
        if key not in known:
            with _torch_threads(threads_per_job(jobs)):
                known[key] = _cost(trial.config)
        plans.append(Plan(trial, known[key]))
    return plans


def plan_table(plans: Sequence[Plan], jobs: int) -> Table:
    """Return a table of all trials and their totals."""
    rows = []
    for each in plans:
        name = ", ".join(f"{key}={_short(value)}" for key, value in each.trial.all_labels.items())
        cost = each.cost
        rows.append((name, magnitude(cost.parameters), str(cost.steps), magnitude(cost.flops), duration(cost.seconds)))
    total = sum(each.cost.seconds for each in plans)
    flops = magnitude(sum(each.cost.flops for each in plans))
    rows.append((f"{len(plans)} runs, {jobs} at a time", "", "", flops, f"about {duration(total / jobs)}"))
    shown = terminal_table(("run", "parameters", "steps", "training FLOPs", "time here"), rows)
    shown.rows[-2].end_section = True
    return shown


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return a time as text: `42 s`, `12 min`, `3.4 h`, `18 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_seed_and_rate(config: _Config) -> _Config:
    """Return the config with seed and learning rate set to constants.

    Configs with an equal result cost the same.
    """
    train = dataclasses.replace(config.train, seed=0, learning_rate=1.0, mup=False)
    return dataclasses.replace(config, seed=0, train=train)


def _cost(config: _Config) -> Cost:
    model, batch_size = config.build_model(), config.train.batch_size
    training_flops = functools.cache(lambda length: model.flops(length).training)

    def seconds_per_step(task: Task) -> float:
        return batch_size * _seconds_per_row(model, task, config, 1)

    steps = plan_steps(config.train, config.build_task, training_flops, seconds_per_step)
    task = config.build_task(steps)
    flops = float(batch_size * total_cost(task, training_flops, 0, steps - 1))
    # A curriculum starts with shorter rows. Their time is taken to shrink with their FLOPs.
    share = flops / (steps * batch_size * training_flops(task.context_length))
    seconds = steps * batch_size * _seconds_per_row(model, task, config, steps) * share
    budget = float("inf") if config.train.flops is None else config.train.flops
    return Cost(model.num_parameters(), steps, min(flops, budget), seconds)


def _seconds_per_row(model: StructuredModel, task: Task, config: _Config, steps: int) -> float:
    """Time forward and backward per full-length row.

    A small batch is called three times; the faster of the last two calls counts.
    """
    rows = min(_TIMED_ROWS, config.train.batch_size)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    batch = {name: each.to(device) for name, each in task.batch(steps - 1, rows).items()}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.enable_grad():
            task.loss(predict(model, batch, config.train.precision), batch).backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append((time.perf_counter() - start) / rows)
        model.zero_grad(set_to_none=True)
    return min(times[1:])
