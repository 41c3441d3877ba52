"""Train one model per attention structure and seed under one budget."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.numbers import grouped, magnitude
from structattn.comparison.results import Cost, Results, Run
from structattn.comparison.run import (
    ModelSizes,
    RunConfig,
    claim,
    degenerate_norms_refused,
    execute,
    of_seed,
    run_name,
    stored_fields,
)
from structattn.layers import MLRConfig, StandardKernel, as_config
from structattn.models import StructuredModel
from structattn.tasks import Task, TaskConfig, build_task, profile_of
from structattn.training import Progress, TrainConfig

MakeProgress = Callable[[RunConfig, int, int], Progress]
"""Called before each run with its config, its index and the number of runs; returns what follows the run."""


@dataclass(frozen=True)
class Comparison:
    """Structures to compare under one task, size and training.

    Raises:
        ValueError: `attentions` is empty or names a structure twice, or `seeds` is below 1.
    """

    attentions: tuple[str, ...]
    """Spellings of the structures."""

    task: TaskConfig
    """Task that every model is trained on."""

    sizes: ModelSizes
    """Sizes of every model."""

    train: TrainConfig
    """Training of every model; each run replaces its seed."""

    seeds: int = 1
    """Number of runs per structure: seeds 0, 1, …"""

    standard_kernel: StandardKernel = "torch"
    """Kernel of standard attention, see `RunConfig`."""

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
        """Runs of all structures with seed 0, then with seed 1, …"""
        return [
            of_seed(RunConfig(name, self.task, self.sizes, self.train, standard_kernel=self.standard_kernel), seed)
            for seed in range(self.seeds)
            for name in self.attentions
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-compatible values."""
        plain = self.runs[0].to_dict()
        del plain["attention"], plain["seed"], plain["train"]["seed"]
        return {"attentions": list(self.attentions), "seeds": self.seeds, **plain}


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    overwrite: bool = False,
    make_progress: MakeProgress | None = None,
    command: Sequence[str] = (),
) -> Results:
    """Run or resume the comparison in `folder`.

    Results are written after every run. If the loss of a run is not finite, the results say so and the other runs go
    on.

    Args:
        comparison: structures, task, sizes, training and seeds.
        folder: folder of this comparison alone.
        overwrite: delete all results and checkpoints in `folder` first, also those of the same comparison.
        make_progress: called before each run.
        command: the command line, for the record.

    Raises:
        RunFolderError: `folder` holds another comparison, or a file cannot be written.
        TypeError, ValueError: settings do not fit each other, or a new comparison has a LayerNorm over two numbers or
            fewer; raised before any training.
    """
    configs = comparison.runs
    is_new = overwrite or not (folder / "config.json").exists()
    with degenerate_norms_refused() if is_new else contextlib.nullcontext():
        costs = {config.attention: _cost(config) for config in configs[: len(comparison.attentions)]}
    task = build_task(comparison.task, seed=0, total_steps=1)
    if overwrite:
        files.remove(
            folder, "config.json", "environment.json", "results.json", "metrics.jsonl", "report.html", "runs", "figures"
        )
    kernel = {"standard_kernel": comparison.standard_kernel}
    claim(folder, "config.json", comparison.to_dict() | kernel | _meaning_of_mlr(comparison))
    files.write_json(folder / "environment.json", environment(command))
    runs = [Run(config.attention, config.seed, f"runs/{run_name(config)}") for config in configs]
    results = _results(comparison, task, costs, runs)
    for index, config in enumerate(configs):
        progress = make_progress(config, index, len(configs)) if make_progress else None
        outcome = execute(config, folder / runs[index].folder, progress)
        if isinstance(outcome, str):
            runs[index] = dataclasses.replace(runs[index], error=outcome)
        else:
            runs[index] = dataclasses.replace(runs[index], rows=tuple(outcome.metrics))
        results = dataclasses.replace(results, runs=tuple(runs))
        results.save(folder)
    return results


def _meaning_of_mlr(comparison: Comparison) -> dict[str, str]:
    """Return the mark of results whose `mlr` has today's meaning.

    In version 0.1.0 `mlr` meant the paper's form. Only comparisons with MLR attention carry the mark.
    """
    mlr = any(isinstance(as_config(name), MLRConfig) for name in comparison.attentions)
    return {"mlr": "levels by window"} if mlr else {}


def _cost(config: RunConfig) -> Cost:
    """Return the costs by formula.

    Raises:
        TypeError, ValueError: structure and sizes do not fit.
    """
    model: StructuredModel = config.build_model()
    length = config.context_length
    flops = model.flops(length)
    return Cost(
        parameters=model.num_parameters(),
        training_flops_per_token=flops.training / length,
        score_flops_per_token=flops.scores / length,
        key_numbers_per_token=model.key_numbers(length) / length,
        value_numbers_per_token=model.value_numbers(length) / length,
    )


def _results(comparison: Comparison, task: Task, costs: Mapping[str, Cost], runs: Sequence[Run]) -> Results:
    profile = profile_of(comparison.task)
    metric, unit = next(iter(task.units.items()))
    test = task.test()
    sizes = stored_fields(comparison.sizes) | {"context_length": task.context_length}
    return Results(
        task=profile.name,
        metric=metric if test is None else f"test_{metric}",
        curve=None if test is None else metric,
        unit=unit,
        budget=_budget_text(comparison.train),
        equal=comparison.train.budget,
        data=task.data_summary,
        sizes={name: size for name, size in sizes.items() if isinstance(size, int)},
        costs=costs,
        runs=tuple(runs),
        baselines=profile.baselines(task),
        examples=() if test is None else tuple(test.examples()),
    )


def _budget_text(train: TrainConfig) -> str:
    """Return text such as `2.00M tokens` or `500 steps`."""
    budget_kind = train.budget
    budget_value = getattr(train, budget_kind)
    budget_unit = {"flops": "training FLOPs", "minutes": "minutes of training"}.get(budget_kind, budget_kind)
    number = magnitude(budget_value) if budget_kind in ("tokens", "flops") else grouped(budget_value)
    return f"{number} {budget_unit}"
