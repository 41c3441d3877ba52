"""The main job: train one model per attention structure and seed under one budget, and say which did best."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.forecasts import forecasts, stretches
from structattn.comparison.numbers import grouped, magnitude
from structattn.comparison.results import Cost, Results, Row, Run
from structattn.comparison.run import ModelSizes, RunConfig, claim, execute, of_seed, run_name, task_name
from structattn.models import StructuredModel
from structattn.tasks import (
    ForecastTask,
    LanguageTask,
    RegressionConfig,
    RegressionTask,
    TaskConfig,
    build_task,
)
from structattn.tasks.baselines import least_squares_error, ridge_error, zero_error
from structattn.tasks.forecasters import Forecaster, forecast_metrics, last_value, linear, seasonal_naive
from structattn.training import Progress, TrainConfig

_RIDGE_PENALTY = 1.0

Announce = Callable[[RunConfig, int, int], Progress]
"""Called before each run with its config, its number and how many there are; what it returns follows the run."""


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how.

    Raises:
        ValueError: no structure, one named twice, or no seed.
    """

    attentions: tuple[str, ...]
    """Spellings of the structures."""

    task: TaskConfig
    sizes: ModelSizes
    train: TrainConfig
    seeds: int = 1

    def __post_init__(self) -> None:
        if not self.attentions:
            raise ValueError("attentions must name at least one structure, got none")
        for name in self.attentions:
            if self.attentions.count(name) > 1:
                raise ValueError(f"attentions must differ, got {name!r} twice")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    @property
    def runs(self) -> list[RunConfig]:
        """Every run: all structures with the first seed, then all with the next."""
        return [
            of_seed(RunConfig(name, self.task, self.sizes, self.train), seed)
            for seed in range(self.seeds)
            for name in self.attentions
        ]

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows."""
        plain = self.runs[0].to_dict()
        del plain["attention"], plain["seed"], plain["train"]["seed"]
        return {"attentions": list(self.attentions), "seeds": self.seeds, **plain}


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    overwrite: bool = False,
    announce: Announce | None = None,
    command: Sequence[str] = (),
) -> Results:
    """Run the comparison in `folder`, or what is left of it, and write its results.

    A run whose loss becomes NaN is reported in the results, and the others go on. After each run the results so far
    are on disk.

    Args:
        comparison: what to compare.
        folder: of this comparison alone.
        overwrite: delete what another config has left there.
        announce: is told of each run before it starts.
        command: the command line, for the record.

    Raises:
        RunFolderError: `folder` holds another comparison, or a file cannot be written.
        TypeError, ValueError: something does not fit together; raised before any training.
    """
    configs = comparison.runs
    costs = {config.attention: _cost(config) for config in configs[: len(comparison.attentions)]}
    task = build_task(comparison.task, seed=0, total_steps=1)
    if overwrite:
        _clear(folder)
    claim(folder, "config.json", comparison.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    runs = [Run(config.attention, config.seed, f"runs/{run_name(config)}") for config in configs]
    results = _results(comparison, task, costs, runs)
    for index, config in enumerate(configs):
        progress = announce(config, index, len(configs)) if announce else None
        outcome = execute(config, folder / runs[index].folder, progress)
        if isinstance(outcome, str):
            runs[index] = dataclasses.replace(runs[index], error=outcome)
        else:
            runs[index] = dataclasses.replace(runs[index], rows=tuple(outcome.metrics))
        results = dataclasses.replace(results, runs=tuple(runs))
        results.save(folder)
    return results


def _cost(config: RunConfig) -> Cost:
    """Costs by formula; building the model is also the check that structure and sizes fit."""
    model: StructuredModel = config.build_model()
    length = config.context_length
    flops = model.flops(length)
    return Cost(
        parameters=model.num_parameters(),
        training_flops_per_token=flops.training / length,
        score_flops_per_token=flops.scores / length,
        key_numbers_per_token=model.key_numbers(length) / length,
    )


def _results(comparison: Comparison, task: Any, costs: Mapping[str, Cost], runs: Sequence[Run]) -> Results:
    metric, unit = next(iter(task.units.items()))
    test = task.test()
    budget = comparison.train.budget
    amount = getattr(comparison.train, budget)
    words = {"flops": "training FLOPs", "minutes": "minutes of training"}.get(budget, budget)
    sizes = dataclasses.asdict(comparison.sizes) | {"context_length": task.context_length}
    return Results(
        task=task_name(comparison.task),
        metric=metric if test is None else f"test_{metric}",
        curve=None if test is None else metric,
        unit=unit,
        budget=f"{magnitude(amount) if budget in ('tokens', 'flops') else grouped(amount)} {words}",
        equal=budget,
        data=_data(task),
        sizes={name: size for name, size in sizes.items() if isinstance(size, int)},
        costs=costs,
        runs=tuple(runs),
        baselines=_baselines(task),
        stretches=tuple(stretches(test)) if isinstance(test, ForecastTask) else (),
    )


def _data(task: Any) -> str:
    if isinstance(task, LanguageTask):
        train, validation = len(task.corpus.train), len(task.corpus.validation)
        return f"{task.corpus.name}: {train:,} characters to train on, {validation:,} to validate on"
    if isinstance(task, ForecastTask):
        names, parts = ", ".join(task.series.channels), task.series.borders
        return (
            f"{task.series.name}: {len(task.series.channels)} channels ({names}), the target {task.config.target}; "
            f"{parts[0]:,} rows to train on, {parts[1] - parts[0]:,} to validate on, {parts[2] - parts[1]:,} to test "
            f"on; the next {task.config.horizon} from the last {task.context_length}"
        )
    config: RegressionConfig = task.config
    return f"x, w ~ N(0, I) in {config.input_dim} dimensions, {config.num_points} points in a prompt"


def _baselines(task: Any) -> dict[str, Row]:
    """Metrics of predictors that are not models, on what the models are evaluated on."""
    if isinstance(task, RegressionTask):
        errors = {
            "least squares": least_squares_error(task),
            f"ridge ({_RIDGE_PENALTY:g})": ridge_error(task, _RIDGE_PENALTY),
            "zero": zero_error(task),
        }
        # These are per prompt and over d; `metrics` divides by both.
        return {
            name: task.metrics({"squared_error": error * task.config.input_dim, "prompts": error.new_ones(())})
            for name, error in errors.items()
        }
    if not isinstance(task, ForecastTask):
        return {}
    test = task.test()
    forecasters: dict[str, Forecaster] = {
        "linear": linear(task),
        f"seasonal ({task.config.season})": seasonal_naive(task),
        "last value": last_value(task),
    }
    rows: dict[str, Row] = {}
    for name, forecaster in forecasters.items():
        tested: Row = {**forecast_metrics(test, forecaster), "forecasts": forecasts(test, forecaster)}
        rows[name] = {**forecast_metrics(task, forecaster), **{f"test_{key}": value for key, value in tested.items()}}
    return rows


def _clear(folder: Path) -> None:
    """Delete what a comparison writes, and nothing else that may lie in the folder."""
    for name in ("config.json", "environment.json", "results.json", "metrics.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for name in ("runs", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)


__all__ = ["Announce", "Comparison", "compare"]
