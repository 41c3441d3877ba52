"""Retrofitting measured: how little of its far keys does a trained model need?

A model with standard attention gets MLR attention for each of a list of ranks; its validation loss is reported with
dimensions in the order that measuring gave and in the one that training left, as it is and after a short tuning.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structattn import checks
from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.run import claim
from structattn.models.retrofit import Order, Pairs
from structattn.retrofit.models import Subject, load_subject
from structattn.training import Progress, TrainConfig, train
from structattn.training.evaluation import evaluate

Announce = Callable[[str, int, int], Progress | None]
"""Called before each model is measured with what it is, its number and how many there are."""


@dataclass(frozen=True)
class Retrofit:
    """What to measure.

    Raises:
        TypeError, ValueError: a field is not in its range.
    """

    model: Path
    """A run's folder, or one that `save_pretrained` wrote: a language model with standard attention, of this project or
    a causal one of transformers."""

    data: str
    """Text, as for `LanguageConfig`: its training part calibrates and tunes, its validation part judges."""

    ranks: tuple[tuple[int, ...], ...]
    """Level ranks to try, each summing to the head width."""

    pairs: Pairs = "far"
    """Whether moments count all tokens, or pairs that share only level 1."""

    calibration_tokens: int = 65_536
    """Tokens that moments are measured on."""

    tune_steps: int = 150
    """Steps of tuning, 0 for none; the standard model is tuned alike."""

    tune_rate: float = 5e-4
    """Peak learning rate of tuning."""

    batch_size: int = 16
    """Sequences of a step."""

    evaluation_tokens: int = 131_072
    """Tokens of the held-out set."""

    context_length: int | None = None
    """Tokens of a window: for a model of transformers by default 512 or, if fewer, all that it has positions for; a
    model of this project keeps its own."""

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("ranks must name at least one split, got none")
        for each in self.ranks:
            checks.positive_ints("ranks", each)
            if self.ranks.count(each) > 1:
                raise ValueError(f"ranks must differ, got {'|'.join(map(str, each))} twice")
        checks.one_of("pairs", self.pairs, ("all", "far"))
        for name in ("calibration_tokens", "batch_size", "evaluation_tokens"):
            checks.positive_int(name, getattr(self, name))
        if self.context_length is not None:
            checks.positive_int("context_length", self.context_length)
        if self.tune_steps < 0:
            raise ValueError(f"tune_steps must be at least 0, got {self.tune_steps}")

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows; what is left open is left out."""
        plain = dataclasses.asdict(self) | {"model": str(self.model), "ranks": [list(each) for each in self.ranks]}
        return {name: value for name, value in plain.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One model, measured."""

    ranks: tuple[int, ...]
    """Level ranks; one for the model as it was."""

    order: Order | None
    """Of the dimensions; None for the model as it was."""

    loss: float
    """Validation loss without tuning."""

    tuned_loss: float | None
    """After tuning."""

    key_numbers_per_token: float
    """Numbers in the key cache at the context length, all layers, over its tokens."""

    score_flops_per_token: float
    """FLOPs of the scores in a forward pass at the context length, all layers."""

    flops_per_token: float
    """FLOPs of a forward pass at the context length."""

    @property
    def name(self) -> str:
        """Such as `16|8|4|4, measured order`."""
        if self.order is None:
            return "standard"
        return f"{'|'.join(map(str, self.ranks))}, {'measured' if self.order == 'measured' else 'trained'} order"


@dataclass(frozen=True)
class RetrofitResults:
    """All that a study found out."""

    positions: str
    """`learned` or `rotary`."""

    context_length: int
    data: str
    tune_steps: int
    rows: tuple[Row, ...] = field(default=())
    unit: str = "nats per character"
    """Of the losses."""

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RetrofitResults:
        """What `save` wrote."""
        plain = files.read_json(folder / "results.json")
        rows = tuple(Row(**row | {"ranks": tuple(row["ranks"])}) for row in plain.pop("rows"))
        return cls(**plain, rows=rows)

    @property
    def standard(self) -> Row:
        """The model as it was."""
        return self.rows[0]


def measure_retrofit(
    study: Retrofit,
    folder: Path,
    *,
    overwrite: bool = False,
    announce: Announce | None = None,
    command: Sequence[str] = (),
) -> RetrofitResults:
    """Carry out the study in `folder`, or what is left of it: each row is on disk as soon as it is measured.

    Raises:
        RunFolderError: `folder` holds another study, or there is no model.
        TypeError, ValueError: ranks do not fit the model, or it has no standard attention; before any training.
    """
    subject = load_subject(study)
    for split in study.ranks:  # whatever a model refuses, it refuses here
        subject.variant(split, "trained").flops(subject.task.context_length)
    if overwrite:
        for name in ("config.json", "environment.json", "results.json"):
            (folder / name).unlink(missing_ok=True)
    claim(folder, "config.json", study.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    results = _no_rows(study, subject)
    if (folder / "results.json").exists():
        results = RetrofitResults.load(folder)
    orders: tuple[Order, ...] = ("measured", "trained")
    wanted: list[_Variant] = [(None, None), *itertools.product(study.ranks, orders)]
    for index in range(len(results.rows), len(wanted)):
        ranks, order = wanted[index]
        model = subject.variant(ranks, order)
        row = _row(subject, model, ranks or (subject.head_width,), order, _loss(study, subject, model))
        if study.tune_steps:
            progress = announce(row.name, index, len(wanted)) if announce else None
            _tune(study, subject, model, row.name, folder / "tuned" / str(index), progress)
            row = dataclasses.replace(row, tuned_loss=_loss(study, subject, model))
        results = dataclasses.replace(results, rows=(*results.rows, row))
        results.save(folder)
    return results


_Variant = tuple[tuple[int, ...] | None, Order | None]


def _no_rows(study: Retrofit, subject: Subject) -> RetrofitResults:
    task = subject.task
    unit = next(iter(task.units.values()))
    return RetrofitResults(subject.positions, task.context_length, task.corpus.name, study.tune_steps, unit=unit)


def _row(subject: Subject, model: Any, ranks: tuple[int, ...], order: Order | None, loss: float) -> Row:
    length = subject.task.context_length
    cost = model.flops(length)
    return Row(
        ranks=ranks,
        order=order,
        loss=loss,
        tuned_loss=None,
        key_numbers_per_token=model.key_numbers(length) / length,
        score_flops_per_token=cost.scores / length,
        flops_per_token=cost.forward / length,
    )


def _loss(study: Retrofit, subject: Subject, model: Any) -> Any:
    """The task's first metric, on its held-out set."""
    return evaluate(model, subject.task, study.batch_size)[next(iter(subject.task.units))]


def _tune(study: Retrofit, subject: Subject, model: Any, name: str, folder: Path, progress: Progress | None) -> None:
    """Train `model` for a few steps."""
    config = TrainConfig(
        steps=study.tune_steps,
        batch_size=study.batch_size,
        learning_rate=study.tune_rate,
        evaluation_interval=study.tune_steps,
    )
    train(model, lambda steps: subject.task, config, folder, structure=name, progress=progress)
    shutil.rmtree(folder)  # checkpoints are for going on when stopped
