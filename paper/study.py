"""What a study is: trials that differ in named ways, a figure of them, and a sentence."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paper.chronos.run import ChronosRunConfig
from structattn.studies import files
from structattn.studies.estimate import Estimate, pooled_margin
from structattn.studies.run import RunConfig, of_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["small", "paper"]
Label = str | int | float

# Regression's metric, language's, Chronos's or forecasting's: a run has one of them.
_METRICS = ("last_error", "nats_per_character", "nats_per_token", "test_target_mae")


@dataclass(frozen=True)
class Trial:
    """One run of a study, and what it differs in from the others."""

    config: RunConfig | ChronosRunConfig
    labels: Mapping[str, Label]

    @property
    def name(self) -> str:
        """Such as `structure=btt,width=32,seed=0`."""
        return ",".join(f"{key}={value}" for key, value in self.all_labels.items())

    @property
    def all_labels(self) -> dict[str, Label]:
        """The labels, and the seed."""
        return {**self.labels, "seed": self.config.seed}

    @property
    def folder(self) -> str:
        """Name of its folder: its own name, as any file system takes it, and a digest of its config.

        Studies that hold the same run share its folder, and runs that differ in what no label says do not.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode()).hexdigest()
        return f"{files.safe_name(self.name)}-{digest[:8]}"


@dataclass(frozen=True)
class Outcome:
    """A trial that ran: its evaluations, or why it failed."""

    labels: Mapping[str, Label]
    parameters: int
    rows: tuple[dict[str, Any], ...] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        """Such as `structure btt, width 32, seed 0`."""
        return ", ".join(f"{key} {value}" for key, value in self.labels.items())

    @property
    def loss(self) -> float:
        """The last evaluation's metric; NaN for a failed trial."""
        return metric(self.rows[-1]) if self.rows else float("nan")

    @property
    def flops(self) -> float:
        """Training FLOPs spent."""
        return float(self.rows[-1]["flops"]) if self.rows else float("nan")

    def tidy(self) -> dict[str, Any]:
        """One row of the table of results."""
        last = self.rows[-1] if self.rows else {}
        measured = {name: last.get(name) for name in ("step", "tokens", "flops", "seconds", "tokens_per_second")}
        return {**self.labels, "parameters": self.parameters, **measured, "loss": self.loss, "failed": self.error or ""}

    def curve(self) -> list[dict[str, Any]]:
        """A row for each evaluation, with every number in it."""
        return [
            {**self.labels, **{name: value for name, value in row.items() if isinstance(value, (int, float))}}
            for row in self.rows
        ]


@dataclass(frozen=True)
class Finding:
    """What a study found."""

    statement: str
    """In numbers, with their uncertainty."""

    agrees: bool | None = None
    """Whether it is what the paper reports; None where the trials cannot tell."""

    @property
    def agreement(self) -> str:
        """The same in words."""
        if self.agrees is None:
            return "The runs cannot tell whether it is as the paper reports."
        return "As the paper reports." if self.agrees else "Not as the paper reports."


class Study(abc.ABC):
    """A figure of the paper as trials, a picture and a finding. The class attributes are its words."""

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    """What it asks, and why."""
    reported: ClassVar[str]
    """What the paper reports."""
    figure: ClassVar[str]
    """Which figure of the paper it is."""
    scales: ClassVar[Mapping[Scale, str]]
    """What is trained at each scale, in a sentence."""
    data: ClassVar[str | None] = None
    """What it reads where nothing else is named; None where it draws its own data."""

    @abc.abstractmethod
    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Every run, cheap ones first, seed by seed.

        Args:
            scale: `small` for two cores and an hour, `paper` for the paper's own sizes.
            data: the text of language studies, the series of forecasts.
            seeds: repeats.
        """

    @abc.abstractmethod
    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """The figure."""

    @abc.abstractmethod
    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """What came out; of some outcomes where trials failed."""


def metric(row: Mapping[str, Any]) -> float:
    """The number that an evaluation is judged by."""
    return float(next(row[name] for name in _METRICS if name in row))


def with_seeds(trials: Iterable[Trial], seeds: int) -> list[Trial]:
    """Each trial with every seed: all trials with the first, then all with the next."""
    trials = list(trials)
    return [dataclasses.replace(trial, config=of_seed(trial.config, seed)) for seed in range(seeds) for trial in trials]


def estimates(outcomes: Iterable[Outcome], *names: str) -> dict[tuple[Label, ...], Estimate]:
    """Mean final loss over seeds for each combination of the named labels, in the order of their appearance."""
    losses: dict[tuple[Label, ...], list[float]] = {}
    for outcome in outcomes:
        if outcome.rows:
            losses.setdefault(tuple(outcome.labels[name] for name in names), []).append(outcome.loss)
    return {key: Estimate.of(values) for key, values in losses.items()}


def below(groups: Iterable[Estimate], low: Estimate, high: Estimate) -> bool | None:
    """Whether `low` is the lower mean; None where they differ by less than the 95% interval of the difference."""
    gap = high.mean - low.mean
    return None if abs(gap) <= pooled_margin(groups, low, high) else gap > 0


def all_of(answers: Sequence[bool | None]) -> bool | None:
    """False if one is; None if one is and none is false, or if there is none at all."""
    if False in answers:
        return False
    return None if None in answers or not answers else True


def sentence(words: str) -> str:
    """The words with a capital and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def resolution(groups: Iterable[Estimate]) -> str:
    """What `show`'s ± is, and how far apart two means of these groups must be."""
    groups = list(groups)
    margin = pooled_margin(groups, groups[0], groups[0])
    if math.isinf(margin):
        return "With one seed no difference tells anything."
    return f"(±: standard error over seeds; means less than {margin:.3f} apart tell nothing, at 95%.)"


def show(estimate: Estimate) -> str:
    """`0.236 ± 0.004` (standard error over seeds), or the mean alone."""
    if estimate.standard_error is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"
