"""Chronos trained from scratch on synthetic series, a model per attention, with equal tokens; judged on held-out ones.

Every model reads the same rows in the same order. Validation loss is reported against training FLOPs, and sampled
forecasts by WQL and MASE: of held-out synthetic series, and zero-shot of the test part of a real series.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from structattn import checks
from structattn.studies import files
from structattn.studies.environment import environment
from structattn.studies.run import claim, seeded
from structattn.tasks.chronos import ChronosDataConfig, ChronosTask
from structattn.tasks.series import load_series
from structattn.training import Progress, TrainConfig, train

if TYPE_CHECKING:
    from chronos import ChronosPipeline

    from structattn.integrations.chronos import ChronosLearner
    from structattn.models import StructuredModel

_EVALUATIONS = 20

Announce = Callable[[str, int, int], Progress | None]
"""Called before each model is trained with its name, its number and how many there are."""

Metrics = dict[str, float]

REDUCED = (64, 2, 2, 256, 32)
"""d_model, layers, heads, d_ff and d_kv of a model that a CPU trains in minutes."""


@dataclass(frozen=True)
class ChronosStudy:
    """What to train, and how.

    Raises:
        TypeError, ValueError: a field is not in its range.
    """

    attentions: tuple[str, ...] = ("standard", "mlr:16|16", "mlr:8|8|8|8")
    """Spellings, as `structattn.integrations.chronos.set_attention` takes them."""

    size: str | tuple[int, int, int, int, int] = REDUCED
    """`tiny`, `mini`, `small`, or d_model, layers, heads, d_ff and d_kv."""

    context_length: int = 256
    """Values that a forecast is made from."""

    prediction_length: int = 32
    """Values to forecast."""

    n_tokens: int = 1024
    """Bins of the tokenizer and special ids."""

    dropout: float = 0.0
    """Share dropped in training."""

    initializer_factor: float = 1.0
    """Of T5's initial deviations; Chronos as published has 0.05."""

    data: ChronosDataConfig = field(default_factory=ChronosDataConfig)
    """Synthetic series."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800, batch_size=16, learning_rate=3e-3, weight_decay=0.0, mup=False, precision="float32"
        )
    )
    """Budget and optimiser; with a budget of steps or tokens all models read the same."""

    seeds: int = 1
    """Runs of each attention."""

    series: str | None = None
    """A real series to forecast without training on it, as `structattn.tasks.series.load_series` takes it."""

    season: int = 24
    """Steps of its season."""

    windows: int = 16
    """Windows of each of its channels, spread evenly over its test part."""

    samples: int = 20
    """Sample paths of a forecast."""

    def __post_init__(self) -> None:
        if not self.attentions:
            raise ValueError("attentions must name at least one structure, got none")
        for name in ("seeds", "season", "windows", "samples"):
            checks.positive_int(name, getattr(self, name))
        if self.train.budget not in ("steps", "tokens"):
            raise ValueError(f"train must have a budget of steps or tokens, equal for all, got {self.train.budget}")

    def build(self, attention: str, seed: int) -> ChronosPipeline:
        """The fresh model; equal weights for every attention."""
        from structattn.integrations.chronos import ChronosSize, make_chronos

        return make_chronos(
            self.size if isinstance(self.size, str) else ChronosSize(*self.size),
            attention,
            context_length=self.context_length,
            prediction_length=self.prediction_length,
            n_tokens=self.n_tokens,
            dropout=self.dropout,
            initializer_factor=self.initializer_factor,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows."""
        plain = dataclasses.asdict(self)
        plain["attentions"] = list(self.attentions)
        plain["size"] = self.size if isinstance(self.size, str) else list(self.size)
        plain["train"]["betas"], plain["train"]["trackers"] = list(self.train.betas), list(self.train.trackers)
        return plain


@dataclass(frozen=True)
class ChronosRun:
    """One trained model."""

    attention: str
    seed: int
    parameters: int
    forward_flops: int
    """Of one row."""
    score_flops: int
    """What inner products of queries and keys take of them, cross-attention's included."""
    curve: list[tuple[int, int, float]]
    """Tokens, training FLOPs and validation loss at every evaluation."""
    metrics: dict[str, Metrics]
    """WQL and MASE by data set."""

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats per token."""
        return self.curve[-1][2]


@dataclass(frozen=True)
class ChronosResults:
    """What came out."""

    runs: list[ChronosRun]
    baselines: dict[str, dict[str, Metrics]]
    """By data set, then by forecaster."""
    study: dict[str, Any]
    """Its settings."""

    def save(self, folder: Path) -> None:
        """As `results.json`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> ChronosResults:
        """What `save` wrote."""
        plain = files.read_json(folder / "results.json")
        runs = [ChronosRun(**run | {"curve": [tuple(point) for point in run["curve"]]}) for run in plain["runs"]]
        return cls(runs, plain["baselines"], plain["study"])


@dataclass(frozen=True)
class _DataSet:
    """Series to forecast."""

    past: NDArray[np.float64]
    future: NDArray[np.float64]
    season: int

    def judge(self, samples: NDArray[np.float64]) -> Metrics:
        from structattn.integrations.chronos import forecast_metrics

        return forecast_metrics(samples, self.past, self.future, season=self.season)


def measure_chronos(
    study: ChronosStudy,
    folder: Path,
    *,
    overwrite: bool = False,
    announce: Announce | None = None,
    command: Sequence[str] = (),
) -> ChronosResults:
    """Train every model of the study, or what is left of it, and write `results.json` into `folder`.

    Args:
        study: what to do.
        folder: of this study alone; called again, it goes on where it stopped.
        overwrite: delete what another study has left there.
        announce: is told of each model before it trains.
        command: the command line, for the record.

    Raises:
        ImportError: without Chronos or gluonts, naming the extra that brings them.
        RunFolderError: `folder` holds another study, or a file cannot be written.
        NonFiniteLossError: a loss is NaN or infinite.
        TypeError, ValueError: something does not fit together.
    """
    for module in ("chronos", "gluonts.ev.metrics", "sklearn.gaussian_process"):
        checks.require(module, "chronos")
    names = [(attention, seed) for seed in range(study.seeds) for attention in study.attentions]
    for attention in study.attentions:  # One that does not fit is refused now.
        config = study.build(attention, 0).model.config
    task = ChronosTask(config, study.data)
    data = _data_sets(study, task)
    if overwrite:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        for name in ("config.json", "environment.json", "results.json"):
            (folder / name).unlink(missing_ok=True)
    claim(folder, "config.json", study.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    results = ChronosResults([], {name: _baselines(each) for name, each in data.items()}, study.to_dict())
    for number, (attention, seed) in enumerate(names):
        progress = announce(f"{attention}, seed {seed}", number, len(names)) if announce else None
        results.runs.append(_run(study, attention, seed, data, folder, progress))
        results.save(folder)
    return results


def _run(
    study: ChronosStudy,
    attention: str,
    seed: int,
    data: Mapping[str, _DataSet],
    folder: Path,
    progress: Progress | None,
) -> ChronosRun:
    from structattn.integrations.chronos import ChronosLearner, forecast

    pipeline = study.build(attention, seed)
    learner = ChronosLearner(pipeline)
    task = ChronosTask(pipeline.model.config, study.data, seed=seed)
    config = dataclasses.replace(study.train, seed=seed)
    if config.evaluation_interval is None and config.steps is not None:
        # The loop's own choice, by the cost of an evaluation, leaves short runs a handful of points.
        config = dataclasses.replace(config, evaluation_interval=-(-config.steps // _EVALUATIONS))
    run_folder = folder / "runs" / f"{re.sub(r'[^A-Za-z0-9.=+-]+', '-', attention)}-seed{seed}"
    with seeded(seed):
        result = train(
            _as_model(learner), lambda steps: task, config, run_folder, structure=attention, progress=progress
        )
    learner.eval()
    pipeline.inner_model.save_pretrained(run_folder / "model")
    cost = learner.flops(task.context_length)
    return ChronosRun(
        attention=attention,
        seed=seed,
        parameters=pipeline.inner_model.num_parameters(),
        forward_flops=cost.forward,
        score_flops=cost.scores,
        curve=[(row["tokens"], row["flops"], row["nats_per_token"]) for row in result.metrics],
        metrics={
            name: each.judge(forecast(pipeline, each.past, study.prediction_length, samples=study.samples, seed=seed))
            for name, each in data.items()
        },
    )


def _as_model(learner: ChronosLearner) -> StructuredModel:
    """The learner as the loop's type: it has the few members that the loop asks for, though it is no such model."""
    return cast("StructuredModel", learner)


def _data_sets(study: ChronosStudy, task: ChronosTask) -> dict[str, _DataSet]:
    """Held-out synthetic series, and windows of the real one where there is one."""
    split, horizon = study.context_length, study.prediction_length
    held_out = task.held_out()
    data = {"synthetic": _DataSet(held_out[:, :split], held_out[:, split:], 1)}
    if study.series is not None:
        series = load_series(study.series)
        first = max(series.borders[1] - split, 0)
        last = series.borders[2] - split - horizon
        if last < first:
            raise ValueError(f"series: the test part of {series.name} is shorter than a forecast of {horizon} steps")
        starts = np.unique(np.linspace(first, last, study.windows).astype(int))
        windows = np.concatenate([series.values[start : start + split + horizon].T for start in starts])
        data[Path(series.name).stem] = _DataSet(windows[:, :split], windows[:, split:], study.season)
    return data


def _baselines(data: _DataSet) -> dict[str, Metrics]:
    from structattn.integrations.chronos import seasonal_naive

    horizon = data.future.shape[1]
    seasons = {"last value": 1} | ({f"seasonal naive ({data.season})": data.season} if data.season > 1 else {})
    return {name: data.judge(seasonal_naive(data.past, horizon, season)) for name, season in seasons.items()}
