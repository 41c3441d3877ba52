"""A study: its trials, their outcomes and its finding."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paper.chronos.run import ChronosRunConfig
from paper.texts import TEXTS, StudyText
from structattn.comparison import files
from structattn.comparison.run import RunConfig, of_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["small", "paper"]
"""Sizes of a study: `small` for two cores and an hour, `paper` for those of the paper."""

Label = str | int | float
"""Value of a label, such as the width of a model."""

UNFINISHED: dict[str, Label] = {"unfinished": "yes"}
"""Label of a run that has not ended."""

# Metrics of regression, language, Chronos and forecasting; each run has one of them.
_METRICS = ("last_error", "nats_per_character", "nats_per_token", "test_target_mae")


@dataclass(frozen=True)
class Trial:
    """One run of a study, and its labels."""

    config: RunConfig | ChronosRunConfig
    labels: Mapping[str, Label]

    @property
    def name(self) -> str:
        """Return a name such as `structure=btt,width=32,seed=0`."""
        return ",".join(f"{key}={value}" for key, value in self.all_labels.items())

    @property
    def all_labels(self) -> dict[str, Label]:
        """Return the labels and the seed."""
        return {**self.labels, "seed": self.config.seed}

    @property
    def folder(self) -> str:
        """Return the name of its folder: its own name and a digest.

        The name is safe for any file system. The digest is that of the config: studies with the same run share its
        folder, and runs that differ only in a setting without a label do not.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode()).hexdigest()
        return f"{files.safe_name(self.name)}-{digest[:8]}"


@dataclass(frozen=True)
class Outcome:
    """Result of a trial: its evaluations, or the error that stopped it."""

    labels: Mapping[str, Label]
    parameters: int
    rows: tuple[dict[str, Any], ...] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        """Return a name such as `structure btt, width 32, seed 0`."""
        return ", ".join(f"{key} {value}" for key, value in self.labels.items())

    @property
    def loss(self) -> float:
        """Return the metric of the last evaluation; NaN for a failed trial."""
        return metric(self.rows[-1]) if self.rows else float("nan")

    @property
    def flops(self) -> float:
        """Return the training FLOPs spent; NaN for a failed trial."""
        return float(self.rows[-1]["flops"]) if self.rows else float("nan")

    def table_row(self) -> dict[str, Any]:
        """Return the row of this trial in results.csv."""
        last = self.rows[-1] if self.rows else {}
        measured = {name: last.get(name) for name in ("step", "tokens", "flops", "seconds", "tokens_per_second")}
        return {**self.labels, "parameters": self.parameters, **measured, "loss": self.loss, "failed": self.error or ""}

    def curve_rows(self) -> list[dict[str, Any]]:
        """Return the rows of this trial in curves.csv.

        Each evaluation is a row with all its numbers.
        """
        return [
            {**self.labels, **{name: value for name, value in row.items() if isinstance(value, (int, float))}}
            for row in self.rows
        ]


@dataclass(frozen=True)
class Finding:
    """Result of a study, and its agreement with the paper."""

    statement: str
    """The result in numbers, with their uncertainty."""

    agrees: bool | None = None
    """True if the paper reports the same; None if the trials cannot tell."""

    @property
    def agreement(self) -> str:
        """Return `agrees` in words."""
        if self.agrees is None:
            return "These runs cannot tell whether the paper's answer holds."
        return "As the paper reports." if self.agrees else "Not as the paper reports."


class Study(abc.ABC):
    """A figure of the paper: its trials, their plot and the finding."""

    name: ClassVar[str]
    """Name of the study, of its command and of its text in `paper.texts`."""

    scales: ClassVar[Mapping[Scale, str]]
    """Sizes and training of the models, in words, by scale."""

    shows_unfinished: ClassVar[bool] = False
    """True if the page of `--finished` also shows runs that have not ended, as far as they got."""

    data: ClassVar[str | None] = None
    """Default text or series; None if the task generates its data."""

    @property
    def text(self) -> StudyText:
        """Return title, question and the paper's answer."""
        return TEXTS[self.name]

    @abc.abstractmethod
    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Return every run, seed by seed.

        Args:
            scale: sizes of the study.
            data: text of language studies, series of forecasts.
            seeds: number of repeats.
        """

    @abc.abstractmethod
    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Draw the figure."""

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Return a Markdown table for the study's page, or nothing."""
        return ""

    @abc.abstractmethod
    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Compare the outcomes with the paper; some trials may have failed."""


def metric(row: Mapping[str, Any]) -> float:
    """Return the metric by which an evaluation is judged."""
    return float(next(row[name] for name in _METRICS if name in row))


def with_seeds(trials: Iterable[Trial], seeds: int) -> list[Trial]:
    """Repeat the trials with every seed, seed by seed."""
    trials = list(trials)
    return [dataclasses.replace(trial, config=of_seed(trial.config, seed)) for seed in range(seeds) for trial in trials]
