"""What a study would take, before it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from paper.chronos.run import ChronosRunConfig
from paper.running import threads_of
from paper.study import Trial
from structattn.models import StructuredModel
from structattn.studies.run import RunConfig
from structattn.studies.table import magnitude
from structattn.studies.terminal import terminal_table
from structattn.tasks import Task
from structattn.training.budget import plan_steps, total_cost
from structattn.training.evaluation import predict

_TIMED_ROWS = 4
_Config = RunConfig | ChronosRunConfig


@dataclass(frozen=True)
class Plan:
    """What one trial would take on this machine."""

    trial: Trial
    parameters: int
    steps: int
    flops: float
    seconds: float


def plan(trials: Sequence[Trial], jobs: int = 1) -> list[Plan]:
    """Every trial with its parameters, steps, FLOPs and time; models that differ only in seed or rate are timed once.

    Args:
        trials: what would run.
        jobs: how many at a time, each with its share of the machine's cores.

    Raises:
        TypeError, ValueError: a trial that could not run.
    """
    known: dict[str, tuple[int, int, float, float]] = {}
    plans = []
    for trial in trials:
        key = str(_kind(trial.config))
        if key not in known:
            with _threads(threads_of(jobs)):
                known[key] = _cost(trial.config)
        plans.append(Plan(trial, *known[key]))
    return plans


def plan_table(plans: Sequence[Plan], jobs: int) -> Table:
    """A row for each trial, and the sum."""
    rows = []
    for each in plans:
        name = ", ".join(f"{key}={_short(value)}" for key, value in each.trial.all_labels.items())
        numbers = (magnitude(each.parameters), str(each.steps), magnitude(each.flops), duration(each.seconds))
        rows.append((name, *numbers))
    total = sum(each.seconds for each in plans)
    flops = magnitude(sum(each.flops for each in plans))
    rows.append((f"{len(plans)} runs, {jobs} at a time", "", "", flops, f"about {duration(total / jobs)}"))
    shown = terminal_table(("run", "parameters", "steps", "training FLOPs", "time here"), rows)
    shown.rows[-2].end_section = True
    return shown


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3.4 h` or `18 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kind(config: _Config) -> _Config:
    """The config without what does not change its cost."""
    train = dataclasses.replace(config.train, seed=0, learning_rate=1.0, mup=False)
    return dataclasses.replace(config, seed=0, train=train)


def _cost(config: _Config) -> tuple[int, int, float, float]:
    model = config.build_model()
    parameters = model.num_parameters()
    steps = plan_steps(
        config.train,
        config.build_task,
        lambda length: model.flops(length).training,
        lambda task: config.train.batch_size * _seconds_per_row(model, task, config, 1),
    )
    task = config.build_task(steps)
    rows = steps * config.train.batch_size
    flops = float(config.train.batch_size * total_cost(task, lambda length: model.flops(length).training, 0, steps - 1))
    full = rows * model.flops(task.context_length).training  # a curriculum begins with shorter rows
    seconds = rows * _seconds_per_row(model, task, config, steps) * flops / full
    return parameters, steps, flops if config.train.flops is None else min(flops, config.train.flops), seconds


def _seconds_per_row(model: StructuredModel, task: Task, config: _Config, steps: int) -> float:
    """Forward and backward of one full-length sequence in a small batch, the better of two after a warm-up."""
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
