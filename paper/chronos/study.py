"""Train Chronos from scratch under several attentions, and evaluate the models.

Every model reads the same rows in the same order. Results are validation loss against training FLOPs, and WQL and MASE
of sampled forecasts: for held-out synthetic series and, zero-shot, for the test part of a real series.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.chronos.attention import COMPARED, label
from paper.chronos.data import DataSet, Metrics, RealSeries
from paper.chronos.run import ChronosRunConfig
from paper.chronos.verdict import chronos_verdict
from structattn import checks
from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.run import claim, execute, of_seed
from structattn.training import Progress, RunFolderError

Announce = Callable[[str, int, int], Progress | None]
"""Called before each training with the model's name, its number and the number of models; returns a progress bar."""


@dataclass(frozen=True)
class ChronosStudy:
    """Config of a study.

    Raises:
        TypeError, ValueError: a field has another type or is out of range.
    """

    attentions: tuple[str, ...] = COMPARED
    """Spellings of the attentions to compare, see `structattn.integrations.chronos.set_attention`."""

    run: ChronosRunConfig = field(default_factory=ChronosRunConfig)
    """Sizes, data and budget of every model; its attention and seed are ignored."""

    seeds: int = 1
    """Runs of each attention."""

    series: RealSeries | None = None
    """A real series to forecast besides the held-out synthetic ones."""

    samples: int = 20
    """Sample paths of a forecast."""

    def __post_init__(self) -> None:
        if not self.attentions:
            raise ValueError("attentions must name at least one structure, got none")
        labels = [label(attention) for attention in self.attentions]
        for name in labels:
            if labels.count(name) > 1:
                raise ValueError(f"attentions must differ, got {name!r} twice")
        for name in ("seeds", "samples"):
            checks.positive_int(name, getattr(self, name))

    @property
    def runs(self) -> list[ChronosRunConfig]:
        """Configs of all runs, seed by seed."""
        return [
            of_seed(dataclasses.replace(self.run, attention=name), seed)
            for seed in range(self.seeds)
            for name in self.attentions
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, attentions by their labels."""
        labels = [label(attention) for attention in self.attentions]
        plain = dataclasses.asdict(self) | {"attentions": labels, "run": self.run.to_dict()}
        if self.series is not None:
            plain["series"]["columns"] = list(self.series.columns)
        del plain["run"]["attention"], plain["run"]["seed"], plain["run"]["train"]["seed"]
        return plain


@dataclass(frozen=True)
class ChronosRun:
    """Results of one trained model."""

    attention: str
    """Label, see `paper.chronos.attention`."""
    seed: int
    parameters: int
    forward_flops: int
    """Forward FLOPs of one row."""
    score_flops: int
    """FLOPs of the products of queries and keys in `forward_flops`, including cross-attention."""
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
    """Results of a study."""

    runs: list[ChronosRun]
    baselines: dict[str, dict[str, Metrics]]
    """Metrics of the baselines, by data set, then by name."""
    study: dict[str, Any]
    """The study's config, from `ChronosStudy.to_dict`."""
    judged: dict[str, list[int]]
    """By data set, the number of series evaluated and the number that `DataSet.usable` dropped."""

    @property
    def verdict(self) -> str:
        """Final losses and FLOPs in words; empty without standard attention."""
        curves = {(run.attention, run.seed): [(flops, loss) for _, flops, loss in run.curve] for run in self.runs}
        words, _ = chronos_verdict(curves)
        spread = " ± is the standard error over seeds." if len({run.seed for run in self.runs}) > 1 else ""
        return f"Nats per token at the end: {words}.{spread}" if words else ""

    def save(self, folder: Path) -> None:
        """Write `results.json` into `folder`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> ChronosResults:
        """Read the results that `save` wrote."""
        plain = files.read_json(folder / "results.json")
        runs = [ChronosRun(**run | {"curve": [tuple(point) for point in run["curve"]]}) for run in plain["runs"]]
        return cls(runs, plain["baselines"], plain["study"], plain["judged"])


def measure_chronos(
    study: ChronosStudy,
    folder: Path,
    *,
    overwrite: bool = False,
    announce: Announce | None = None,
    command: Sequence[str] = (),
) -> ChronosResults:
    """Train and evaluate every model of a study; write its results.

    `results.json` in `folder` is written after each model.

    Args:
        study: config of the study.
        folder: folder of this study alone; a second call resumes the study.
        overwrite: delete the results of another study in `folder`.
        announce: called before each model is trained, see `Announce`.
        command: the command line, recorded in `environment.json`.

    Raises:
        ImportError: without Chronos, gluonts or scikit-learn, naming the extra that brings them.
        RunFolderError: `folder` holds another study, a file cannot be written, or a loss became NaN or infinite.
        TypeError, ValueError: parts of the config do not fit each other.
    """
    for module in ("chronos", "gluonts.ev.metrics", "sklearn.gaussian_process"):
        checks.require(module, "paper")
    for config in study.runs[: len(study.attentions)]:  # Raises now if one does not fit.
        config.build_model()
    data = _data_sets(study)
    baselines = {name: _baselines(each) for name, each in data.items()}
    if overwrite:
        made = ("config.json", "environment.json", "results.json", "table.md", "loss-flops.png", "loss-flops.svg")
        files.remove(folder, "runs", *made)
    claim(folder, "config.json", study.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    judged = {name: [len(each.past), each.left_out] for name, each in data.items()}
    results = ChronosResults([], baselines, study.to_dict(), judged)
    for number, config in enumerate(study.runs):
        name = f"{config.label}, seed {config.seed}"
        progress = announce(name, number, len(study.runs)) if announce else None
        results.runs.append(_run(config, study.samples, data, folder, progress))
        results.save(folder)
    return results


def _run(
    config: ChronosRunConfig, samples: int, data: Mapping[str, DataSet], folder: Path, progress: Progress | None
) -> ChronosRun:
    from structattn.integrations.chronos import ChronosLearner, forecast, load_chronos

    run_folder = folder / "runs" / config.folder
    result = execute(config, run_folder, progress)
    if isinstance(result, str):
        raise RunFolderError(run_folder, result)
    pipeline = load_chronos(run_folder / "model")
    kept = run_folder / "forecasts.json"  # Sampling is slow: a resumed study reads it.
    if not kept.exists():
        metrics = {
            name: each.judge(forecast(pipeline, each.past, config.prediction_length, samples=samples, seed=config.seed))
            for name, each in data.items()
        }
        files.write_json(kept, metrics)
    cost = ChronosLearner(pipeline).flops(config.row_length)
    return ChronosRun(
        attention=config.label,
        seed=config.seed,
        parameters=pipeline.inner_model.num_parameters(),
        forward_flops=cost.forward,
        score_flops=cost.scores,
        curve=[(row["tokens"], row["flops"], row["nats_per_token"]) for row in result.metrics],
        metrics=files.read_json(kept),
    )


def _data_sets(study: ChronosStudy) -> dict[str, DataSet]:
    """Return the held-out synthetic series and the windows of the real one."""
    split, horizon = study.run.context_length, study.run.prediction_length
    held_out = study.run.build_task(1).held_out()
    data = {"synthetic": DataSet(held_out[:, :split], held_out[:, split:], 1).usable()}
    if study.series is not None:
        name = Path(study.series.data).stem
        data[name if name not in data else f"{name}.csv"] = study.series.windows(split, horizon).usable()
    return data


def _baselines(data: DataSet) -> dict[str, Metrics]:
    from structattn.integrations.chronos import seasonal_naive_samples

    horizon = data.future.shape[1]
    seasons = {"last value": 1} | ({f"seasonal naive ({data.season})": data.season} if data.season > 1 else {})
    return {name: data.judge(seasonal_naive_samples(data.past, horizon, season)) for name, season in seasons.items()}
