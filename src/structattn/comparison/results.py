"""What a comparison found: costs of each structure, every evaluation of every run, and their files.

`results.json` holds all but the curves; `metrics.jsonl` holds those, one evaluation per line, all runs joined.
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
from structattn.training.errors import RunFolderError

Row = dict[str, Any]
"""One evaluation, as `structattn.training.train` writes it: counters, speed, and the task's metrics."""


@dataclass(frozen=True)
class Cost:
    """What a model with a given structure costs, known before any training; per token at the trained length."""

    parameters: int
    """Numbers that are trained."""

    training_flops_per_token: float
    """Forward and backward FLOPs of the whole model."""

    score_flops_per_token: float
    """Forward FLOPs of the inner products between queries and keys, over all blocks and heads."""

    key_numbers_per_token: float
    """Numbers in the key caches of all blocks when generating at the trained length, over that length."""


@dataclass(frozen=True)
class Run:
    """One model: a structure trained with a seed."""

    structure: str
    """Spelling of the attention structure."""

    seed: int
    """Names the start of the model and the order of the data."""

    folder: str
    """Where the run lies, relative to the comparison's folder."""

    rows: tuple[Row, ...] = ()
    """Evaluations, oldest first."""

    error: str | None = None
    """Why the run ended before its budget, if it did."""

    @property
    def done(self) -> bool:
        """Whether the run spent its budget and has a result."""
        return self.error is None and bool(self.rows)

    @property
    def final(self) -> Row:
        """The last evaluation."""
        return self.rows[-1]


@dataclass(frozen=True)
class Results:
    """All that the table, the figures and the report are made of."""

    task: str
    """`language`, `regression` or `forecast`."""

    metric: str
    """Name of the number by which structures are compared, lower is better: a key of each run's last row."""

    unit: str
    """Its unit, for axes and headings."""

    budget: str
    """The budget in words, such as `1.2e+14 training FLOPs`."""

    equal: str
    """What the budget makes equal for every structure: `steps`, `tokens`, `flops` or `minutes`."""

    data: str
    """The data in words."""

    sizes: Mapping[str, int]
    """Sizes of the models by name, the same for every structure."""

    costs: Mapping[str, Cost]
    """Costs by structure, in the order of the command."""

    runs: tuple[Run, ...]
    """Every run, in order."""

    baselines: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    """Metrics of predictors that are not models, by their names."""

    curve: str | None = None
    """Where `metric` is measured on a test part, its name on the validation part: a key of every row."""

    stretches: tuple[dict[str, Any], ...] = ()
    """For forecasts, what they are drawn on: see `structattn.comparison.forecasts`."""

    @property
    def followed(self) -> str:
        """Name of the number that is followed through training: a key of every row."""
        return self.curve or self.metric

    @property
    def is_causal(self) -> bool:
        """Whether the models see the past alone, and so have a key cache to generate from."""
        return self.task != "forecast"

    @property
    def structures(self) -> tuple[str, ...]:
        """Spellings of the structures, in the order of the command."""
        return tuple(self.costs)

    def finished(self, structure: str) -> list[Run]:
        """The runs of `structure` that spent their budget, by seed."""
        return [run for run in self.runs if run.structure == structure and run.done]

    def tokens_per_second(self, structure: str) -> float:
        """All tokens that finished runs read over all the time they took; 0 where none finished."""
        runs = self.finished(structure)
        seconds = sum(run.final["seconds"] for run in runs)
        return float(sum(run.final["tokens"] for run in runs) / seconds) if seconds else 0.0

    @property
    def failed(self) -> list[Run]:
        """Runs that ended early."""
        return [run for run in self.runs if run.error is not None]

    @property
    def complete(self) -> bool:
        """Whether every run spent its budget."""
        return all(run.done for run in self.runs)

    def estimate(self, structure: str, column: str | None = None) -> Estimate | None:
        """Mean and standard error over seeds of a column of the last evaluation; None where no run finished."""
        runs = self.finished(structure)
        return Estimate.of([run.final[column or self.metric] for run in runs]) if runs else None

    @property
    def ranking(self) -> list[str]:
        """Structures with a result, the lowest mean of the metric first."""
        means = {name: estimate.mean for name in self.structures if (estimate := self.estimate(name))}
        return sorted(means, key=means.__getitem__)

    @property
    def best_run(self) -> Run | None:
        """The run with the lowest metric of all; None where none finished."""
        runs = [run for run in self.runs if run.done]
        return min(runs, key=lambda run: run.final[self.metric]) if runs else None

    def save(self, folder: Path) -> None:
        """Write `results.json` and `metrics.jsonl` into `folder`, each at once or not at all.

        Raises:
            RunFolderError: a file cannot be written; what it held before is intact.
        """
        plain = dataclasses.asdict(self) | {"summary": self._summary()}
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
        """What `save` wrote.

        Raises:
            RunFolderError: a file is missing, or is not what `save` wrote.
        """
        plain = files.read_json(folder / "results.json")
        rows: dict[tuple[str, int], list[Row]] = {}
        for row in files.read_json_lines(folder / "metrics.jsonl"):
            rows.setdefault((row.pop("structure"), row.pop("seed")), []).append(row)
        try:
            del plain["summary"]
            plain["costs"] = {name: Cost(**cost) for name, cost in plain["costs"].items()}
            for record in plain["runs"]:
                del record["final"]
                record["rows"] = tuple(rows.get((record["structure"], record["seed"]), ()))
            plain["runs"] = tuple(Run(**record) for record in plain["runs"])
            plain["stretches"] = tuple(plain["stretches"])
            return cls(**plain)
        except (KeyError, TypeError) as error:
            reason = f"written by another version ({error}); the command that made it, run again, writes it anew"
            raise RunFolderError(folder / "results.json", reason) from error

    def _summary(self) -> dict[str, Any]:
        """For readers of results.json: each structure's mean metric, its standard error and number of runs."""
        estimates = {name: self.estimate(name) for name in self.structures}
        return {name: estimate and dataclasses.asdict(estimate) for name, estimate in estimates.items()}
