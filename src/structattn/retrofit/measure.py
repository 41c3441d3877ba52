"""Measure what a trained model loses when it gets MLR attention.

A model with standard attention gets MLR attention of each of several ranks. Its validation loss is measured with
dimensions ordered by measured energy and in the order that training left, before and after a short tuning.
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
from structattn.models.mlr_conversion import OrderSource, TokenPairs
from structattn.retrofit.models import TrainedModel, load_model
from structattn.training import Progress, TrainConfig, train
from structattn.training.evaluation import evaluate

MakeProgress = Callable[[str, int, int], Progress | None]
"""Called before each tuning with the model's name, its index and the number of models; returns what follows it."""


@dataclass(frozen=True)
class Retrofit:
    """Settings of a retrofit study.

    Raises:
        TypeError, ValueError: a field is out of range.
    """

    model: Path
    """Folder of a structattn run, or a `save_pretrained` folder of a structattn or causal transformers model. The model
    must have standard attention."""

    data: str
    """Text spec of `LanguageConfig.data`. The training part calibrates and tunes; the validation part evaluates."""

    ranks: tuple[tuple[int, ...], ...]
    """Level ranks to try; each sums to the head width."""

    pairs: TokenPairs = "far"
    """Token pairs whose scores give the measured order: `all`, or `far` ones, which share only level 1. Far tokens
    lie in different halves of the context; in transformers models, at least half a context apart."""

    calibration_tokens: int = 65_536
    """Tokens of training text that the order of dimensions is measured on."""

    tune_steps: int = 150
    """Steps of tuning, 0 for none. The standard model is tuned in the same way."""

    tune_rate: float = 5e-4
    """Peak learning rate of tuning."""

    batch_size: int = 16
    """Sequences per step."""

    evaluation_tokens: int = 131_072
    """Tokens to evaluate on."""

    context_length: int | None = None
    """Window length. Default: 512 for transformers models (fewer if the model has fewer positions); structattn models
    keep their own."""

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("ranks must name at least one split, got none")
        for split in self.ranks:
            checks.positive_ints("ranks", split)
            if self.ranks.count(split) > 1:
                raise ValueError(f"ranks must differ, got {'|'.join(map(str, split))} twice")
        checks.one_of("pairs", self.pairs, ("all", "far"))
        for name in ("calibration_tokens", "batch_size", "evaluation_tokens"):
            checks.positive_int(name, getattr(self, name))
        if self.context_length is not None:
            checks.positive_int("context_length", self.context_length)
        if self.tune_steps < 0:
            raise ValueError(f"tune_steps must be at least 0, got {self.tune_steps}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values, without unset ones."""
        plain = dataclasses.asdict(self) | {"model": str(self.model), "ranks": [list(split) for split in self.ranks]}
        return {name: value for name, value in plain.items() if value is not None}


@dataclass(frozen=True)
class Measurement:
    """Losses and costs of one model."""

    ranks: tuple[int, ...]
    """Level ranks; a single one for standard attention."""

    order: OrderSource | None
    """Order of the dimensions; None for standard attention."""

    loss: float
    """Validation loss before tuning."""

    tuned_loss: float | None
    """Validation loss after tuning; None without tuning."""

    key_numbers_per_token: float
    """Numbers in the key caches of all layers at the context length, per token."""

    score_flops_per_token: float
    """Forward FLOPs of the scores of all layers at the context length, per token."""

    flops_per_token: float
    """Forward FLOPs of the model at the context length, per token."""

    @property
    def name(self) -> str:
        """Name such as `16|8|4|4, measured order`."""
        if self.order is None:
            return "standard"
        return f"{'|'.join(map(str, self.ranks))}, {'measured' if self.order == 'measured' else 'trained'} order"


@dataclass(frozen=True)
class RetrofitResults:
    """Results of a retrofit study."""

    positions: str
    """`learned` or `rotary`."""

    context_length: int
    data: str
    tune_steps: int
    rows: tuple[Measurement, ...] = field(default=())
    """Standard attention first, then each of the ranks in both orders."""

    unit: str = "nats per character"
    """Unit of the losses."""

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RetrofitResults:
        """Return the results that `save` wrote."""
        plain = files.read_json(folder / "results.json")
        rows = tuple(Measurement(**row | {"ranks": tuple(row["ranks"])}) for row in plain.pop("rows"))
        return cls(**plain, rows=rows)

    @property
    def standard(self) -> Measurement:
        """The model with standard attention."""
        return self.rows[0]


def measure_retrofit(
    study: Retrofit,
    folder: Path,
    *,
    overwrite: bool = False,
    make_progress: MakeProgress | None = None,
    command: Sequence[str] = (),
) -> RetrofitResults:
    """Run or resume the study in `folder`.

    Results are written after every model.

    Args:
        study: the settings.
        folder: folder of this study alone.
        overwrite: delete all results and checkpoints in `folder` first, also those of the same study.
        make_progress: called before each tuning.
        command: the command line, for the record.

    Raises:
        RunFolderError: `folder` holds another study, or there is no model.
        TypeError, ValueError: ranks do not fit the model, or it has no standard attention; raised before any training.
    """
    trained = load_model(study)
    for split in study.ranks:  # Ranks that do not fit are refused before anything is written.
        trained.variant(split, "trained").flops(trained.task.context_length)
    if overwrite:
        files.remove(folder, "config.json", "environment.json", "results.json", "tuned")
    claim(folder, "config.json", study.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    results = _load_or_new_results(study, trained, folder)
    orders: tuple[OrderSource, ...] = ("measured", "trained")
    splits: list[tuple[tuple[int, ...] | None, OrderSource | None]]
    splits = [(None, None), *itertools.product(study.ranks, orders)]  # Standard attention first.
    for index in range(len(results.rows), len(splits)):
        ranks, order = splits[index]
        model = trained.variant(ranks, order)
        row = _measure(study, trained, model, ranks or (trained.head_width,), order)
        if study.tune_steps:
            progress = make_progress(row.name, index, len(splits)) if make_progress else None
            _tune(study, trained, model, row.name, folder / "tuned" / str(index), progress)
            row = dataclasses.replace(row, tuned_loss=_loss(study, trained, model))
        results = dataclasses.replace(results, rows=(*results.rows, row))
        results.save(folder)
    return results


def _load_or_new_results(study: Retrofit, trained: TrainedModel, folder: Path) -> RetrofitResults:
    """Return the results so far; without rows if there are none."""
    if (folder / "results.json").exists():
        return RetrofitResults.load(folder)
    task = trained.task
    unit = next(iter(task.units.values()))
    return RetrofitResults(trained.positions, task.context_length, task.corpus.name, study.tune_steps, unit=unit)


def _measure(
    study: Retrofit, trained: TrainedModel, model: Any, ranks: tuple[int, ...], order: OrderSource | None
) -> Measurement:
    """Return the loss of one model before tuning, and its costs."""
    length = trained.task.context_length
    cost = model.flops(length)
    return Measurement(
        ranks=ranks,
        order=order,
        loss=_loss(study, trained, model),
        tuned_loss=None,
        key_numbers_per_token=model.key_numbers(length) / length,
        score_flops_per_token=cost.scores / length,
        flops_per_token=cost.forward / length,
    )


def _loss(study: Retrofit, trained: TrainedModel, model: Any) -> Any:
    """Return the task's headline metric on its held-out set."""
    return evaluate(model, trained.task, study.batch_size)[next(iter(trained.task.units))]


def _tune(
    study: Retrofit, trained: TrainedModel, model: Any, name: str, folder: Path, progress: Progress | None
) -> None:
    """Train `model` for a few steps."""
    config = TrainConfig(
        steps=study.tune_steps,
        batch_size=study.batch_size,
        learning_rate=study.tune_rate,
        evaluation_interval=study.tune_steps,
    )
    train(model, lambda steps: trained.task, config, folder, structure=name, progress=progress)
    shutil.rmtree(folder)  # Checkpoints serve only to resume.
