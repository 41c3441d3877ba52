"""Hold the results of a comparison: costs and evaluations.

`metrics.jsonl` holds the evaluations of all runs, one per line; `results.json` holds everything else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structattn.comparison import files
from structattn.comparison.estimate import Estimate
from structattn.tasks.profiles import Metrics, TaskProfile, profile_named
from structattn.training.errors import RunFolderError


@dataclass(frozen=True)
class Cost:
    """Costs of a structure at the trained length, known before training."""

    parameters: int
    """Trainable numbers."""

    training_flops_per_token: float
    """Forward and backward FLOPs of the whole model."""

    score_flops_per_token: float
    """Forward FLOPs of the inner products between queries and keys, over all blocks and heads."""

    key_numbers_per_token: float
    """Numbers in the key caches of all blocks when generating at the trained length, over that length."""

    value_numbers_per_token: float | None = None
    """Numbers in the value caches of all blocks, over that length; None in results of version 0.1.0."""


@dataclass(frozen=True)
class Run:
    """A model with one structure, trained with one seed."""

    structure: str
    """Spelling of the attention structure."""

    seed: int
    """Seed of initialisation, data order and dropout."""

    folder: str
    """Folder of the run, relative to the comparison's."""

    rows: tuple[Metrics, ...] = ()
    """Evaluations, oldest first."""

    error: str | None = None
    """Reason why the run ended before its budget; None if it did not."""

    @property
    def done(self) -> bool:
        """True if the run spent its budget and has a result."""
        return self.error is None and bool(self.rows)

    @property
    def final(self) -> Metrics:
        """Last evaluation."""
        return self.rows[-1]


@dataclass(frozen=True)
class Results:
    """Everything that the table, the figures and the report show."""

    task: str
    """Name of the task in `structattn.tasks.TASKS`."""

    metric: str
    """Name of the metric that ranks structures, lower is better: a key of each run's last row."""

    unit: str
    """Its unit, for axes and headings."""

    budget: str
    """The budget in words, such as `1.2e+14 training FLOPs`."""

    equal: str
    """Quantity that is equal for every structure: `steps`, `tokens`, `flops` or `minutes`."""

    data: str
    """The data in words."""

    sizes: Mapping[str, int]
    """Sizes of the models by name, the same for every structure."""

    costs: Mapping[str, Cost]
    """Costs by structure, in the order of the command."""

    runs: tuple[Run, ...]
    """Every run, in order."""

    baselines: Mapping[str, Metrics] = dataclasses.field(default_factory=dict)
    """Metrics of the task's baselines, by their names."""

    curve: str | None = None
    """Name of the metric on the validation part, a key of every row; None if `metric` itself is measured there."""

    examples: tuple[dict[str, Any], ...] = ()
    """The task's examples (`Task.examples`), which predictions are drawn on; `stretches` in `results.json`."""

    @property
    def profile(self) -> TaskProfile:
        """Profile of the task.

        Raises:
            ValueError: the task is not registered.
        """
        return profile_named(self.task)

    @property
    def columns(self) -> dict[str, str]:
        """Headings of the measured metrics by name, `metric` always among them."""
        rows = [row for run in self.runs for row in run.rows] + list(self.baselines.values())
        measured = {self.metric}.union(*rows)
        return {name: heading for name, heading in self.profile.columns.items() if name in measured}

    @property
    def followed(self) -> str:
        """Name of the metric that curves show: a key of every row."""
        return self.curve or self.metric

    @property
    def is_causal(self) -> bool:
        """True if models see only the past and have a key-value cache."""
        return self.profile.is_causal

    @property
    def structures(self) -> tuple[str, ...]:
        """Spellings of the structures, in the order of the command."""
        return tuple(self.costs)

    @property
    def counts_values(self) -> bool:
        """True if `cached_per_token` counts keys and values.

        Results of version 0.1.0 count keys alone.
        """
        return all(cost.value_numbers_per_token is not None for cost in self.costs.values())

    def cached_per_token(self, structure: str) -> float:
        """Return the model's cache numbers per token, at the trained length."""
        cost = self.costs[structure]
        values = cost.value_numbers_per_token if self.counts_values else None
        return cost.key_numbers_per_token + (values or 0.0)

    def finished(self, structure: str) -> list[Run]:
        """Return the runs of `structure` that spent their budget, by seed."""
        return [run for run in self.runs if run.structure == structure and run.done]

    def tokens_per_second(self, structure: str) -> float:
        """Return tokens over seconds of all finished runs; 0 if none finished."""
        runs = self.finished(structure)
        seconds = sum(run.final["seconds"] for run in runs)
        return float(sum(run.final["tokens"] for run in runs) / seconds) if seconds else 0.0

    @property
    def failed(self) -> list[Run]:
        """Runs that ended early."""
        return [run for run in self.runs if run.error is not None]

    @property
    def complete(self) -> bool:
        """True if every run spent its budget."""
        return all(run.done for run in self.runs)

    def estimate(self, structure: str, column: str | None = None) -> Estimate:
        """Return a final metric's mean over seeds, for a structure in `ranking`."""
        return Estimate.of([run.final[column or self.metric] for run in self.finished(structure)])

    @property
    def ranking(self) -> list[str]:
        """Structures with a result, the lowest mean of the metric first."""
        means = {name: self.estimate(name).mean for name in self.structures if self.finished(name)}
        return sorted(means, key=means.__getitem__)

    @property
    def best_run(self) -> Run | None:
        """Run with the lowest metric; None if none finished."""
        runs = [run for run in self.runs if run.done]
        return min(runs, key=lambda run: run.final[self.metric]) if runs else None

    def save(self, folder: Path) -> None:
        """Write `results.json` and `metrics.jsonl` into `folder`.

        Each file is written completely or not at all.

        Raises:
            RunFolderError: a file cannot be written; what it held before is intact.
        """
        plain = dataclasses.asdict(self)
        plain["stretches"] = plain.pop("examples")
        plain["summary"] = self._summary()
        for run, record in zip(self.runs, plain["runs"], strict=True):
            record["final"] = run.final if run.rows else None
            del record["rows"]
        lines = [
            json.dumps({"structure": run.structure, "seed": run.seed, **row}, allow_nan=False)
            for run in self.runs
            for row in run.rows
        ]
        files.write_text(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))
        files.write_json(folder / "results.json", plain)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Return the results that `save` wrote.

        Raises:
            RunFolderError: a file is missing, damaged, or of another version.
        """
        plain = files.read_json(folder / "results.json")
        rows: dict[tuple[str, int], list[Metrics]] = {}
        for row in files.read_json_lines(folder / "metrics.jsonl"):
            rows.setdefault((row.pop("structure"), row.pop("seed")), []).append(row)
        try:
            del plain["summary"]
            plain["costs"] = {name: Cost(**cost) for name, cost in plain["costs"].items()}
            for record in plain["runs"]:
                del record["final"]
                record["rows"] = tuple(rows.get((record["structure"], record["seed"]), ()))
            plain["runs"] = tuple(Run(**record) for record in plain["runs"])
            plain["examples"] = tuple(plain.pop("stretches"))
            return cls(**plain)
        except (KeyError, TypeError) as error:
            reason = f"written by another version ({error}); the command that made it, run again, writes it anew"
            raise RunFolderError(folder / "results.json", reason) from error

    def _summary(self) -> dict[str, Any]:
        """Return mean, standard error and number of runs by structure."""
        finished = self.ranking
        return {name: dataclasses.asdict(self.estimate(name)) if name in finished else None for name in self.structures}
