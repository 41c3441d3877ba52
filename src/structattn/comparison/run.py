"""One run: a model with a given attention structure, trained on a task; all that defines it is in its `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from structattn.comparison import files
from structattn.comparison.forecasts import forecasts
from structattn.models import (
    ForecastModel,
    ForecastModelConfig,
    LanguageModel,
    LanguageModelConfig,
    RegressionModel,
    RegressionModelConfig,
    StructuredModel,
)
from structattn.tasks import (
    ForecastConfig,
    ForecastTask,
    LanguageConfig,
    RegressionConfig,
    Task,
    TaskConfig,
    build_task,
)
from structattn.training import NonFiniteLossError, Progress, RunFolderError, TrainConfig, TrainResult, train
from structattn.training.evaluation import evaluate, predict

_TASKS: dict[str, type[TaskConfig]] = {
    "language": LanguageConfig,
    "regression": RegressionConfig,
    "forecast": ForecastConfig,
}

_MODELS: dict[type[TaskConfig], type[StructuredModel]] = {
    LanguageConfig: LanguageModel,
    RegressionConfig: RegressionModel,
    ForecastConfig: ForecastModel,
}


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model, the same for every structure of a comparison."""

    layers: int
    dim: int
    heads: int
    positions: str = "learned"


@dataclass(frozen=True)
class RunConfig:
    """All that defines a run."""

    attention: str
    """Spelling of the attention structure."""

    task: TaskConfig
    sizes: ModelSizes
    train: TrainConfig
    seed: int = 0
    """Names the start of the model, the order of the data, and dropout."""

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""
        if isinstance(self.task, RegressionConfig):
            return 4 * self.task.input_dim
        return self.task.context_length

    def build_model(self) -> StructuredModel:
        """The fresh model, a pure function of the config.

        Raises:
            TypeError, ValueError: sizes or structure that do not fit each other.
        """
        common = dataclasses.asdict(self.sizes) | {"attention": self.attention, "context_length": self.context_length}
        with seeded(self.seed):
            if isinstance(self.task, LanguageConfig):
                return LanguageModel(LanguageModelConfig(**common))
            if isinstance(self.task, RegressionConfig):
                return RegressionModel(RegressionModelConfig(**common, input_dim=self.task.input_dim))
            common |= {"horizon": self.task.horizon, "window_norm": self.task.window_norm}
            return ForecastModel(ForecastModelConfig(**common, channels=ForecastTask(self.task).channels))

    def build_task(self, total_steps: int) -> Task:
        """The task of a run of so many steps."""
        return build_task(self.task, seed=self.seed, total_steps=total_steps)

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows."""
        plain = dataclasses.asdict(self)
        plain["task"] = {"name": task_name(self.task), **plain["task"]}
        for part in ("task", "train"):
            plain[part] = {
                name: list(value) if isinstance(value, tuple) else value for name, value in plain[part].items()
            }
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RunConfig:
        """What `to_dict` gave."""
        task: dict[str, Any]
        training: dict[str, Any]
        task, training = (
            {name: tuple(value) if isinstance(value, list) else value for name, value in plain[part].items()}
            for part in ("task", "train")
        )
        return cls(
            plain["attention"],
            _TASKS[task.pop("name")](**task),
            ModelSizes(**plain["sizes"]),
            TrainConfig(**training),
            plain["seed"],
        )


class Trainable(Protocol):
    """What `execute` asks of a config, a dataclass: all that defines a run."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def attention(self) -> str:
        """Names the structure."""

    @property
    def train(self) -> TrainConfig:
        """Budget and optimiser."""

    @property
    def seed(self) -> int:
        """Names the start of the model, the order of the data, and dropout."""

    def build_model(self) -> StructuredModel:
        """The fresh model."""

    def build_task(self, total_steps: int) -> Task:
        """The task of a run of so many steps."""

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows; equal ones are the same run."""


Config = TypeVar("Config", bound=Trainable)


def of_seed(config: Config, seed: int) -> Config:
    """The same config with another seed, in the model and in the training."""
    return dataclasses.replace(config, seed=seed, train=dataclasses.replace(config.train, seed=seed))


def run_name(config: Trainable) -> str:
    """Name of the run's folder among those of a comparison, such as `mlr-16-8-8-seed0`."""
    return f"{files.safe_name(config.attention.replace(',', '-'))}-seed{config.seed}"


def task_name(config: TaskConfig) -> str:
    """`language`, `regression` or `forecast`."""
    return next(name for name, kind in _TASKS.items() if isinstance(config, kind))


def execute(config: Trainable, folder: Path, progress: Progress | None = None) -> TrainResult | str:
    """Begin the run in `folder`, go on with it, or read its result; the trained model ends in `folder/model`.

    Where the task has a test part, the last evaluation has its metrics too, under their names with `test_` before.

    Returns:
        The result; or, where the loss became NaN or infinite, why in one line: such a run is over.

    Raises:
        RunFolderError: `folder` holds a run of another config, or cannot be written.
        TypeError, ValueError: the config does not fit together, or its data cannot be used.
    """
    claim(folder, "run.json", config.to_dict())
    failure = folder / "failed.txt"
    if failure.exists():
        return failure.read_text(encoding="utf-8").strip()
    model = config.build_model()
    try:
        with seeded(config.seed):
            result = train(
                model, config.build_task, config.train, folder, structure=config.attention, progress=progress
            )
    except NonFiniteLossError as error:
        files.write_text(failure, f"{error}\n")
        return str(error)
    if not (folder / "model" / "config.json").exists():
        _save_model(model, folder / "model")
    last = result.metrics[-1] | _test(config, model, folder / "test.json")
    return dataclasses.replace(result, metrics=[*result.metrics[:-1], last])


def load_run(folder: Path) -> tuple[RunConfig, StructuredModel]:
    """The config of a finished run and its trained model.

    Raises:
        RunFolderError: there is no finished run in `folder`.
    """
    if not (folder / "run.json").exists():
        raise RunFolderError(folder, "there is no run here (no run.json)")
    plain = files.read_json(folder / "run.json")
    if "task" not in plain:
        raise RunFolderError(folder, "a run of Chronos: structattn.integrations.chronos.load_chronos reads its model")
    config = RunConfig.from_dict(plain)
    if not (folder / "model" / "config.json").exists():
        raise RunFolderError(folder, "the run here is not finished: train it to the end first")
    return config, _MODELS[type(config.task)].from_pretrained(folder / "model")


def claim(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Write `config` as `folder/name`, or see that the very same is there.

    Raises:
        RunFolderError: another config is there, or it cannot be written.
    """
    path = folder / name
    if not path.exists():
        files.make_folder(folder)
        files.write_json(path, config)
        return
    there = files.read_json(path)
    if there != config:
        change = next(_differences(there, config))
        raise RunFolderError(
            folder, f"holds results of another config ({change}); choose another folder or --overwrite"
        )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default generator starts from `seed`; outside it is as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _test(config: Trainable, model: StructuredModel, path: Path) -> dict[str, Any]:
    """Metrics of the trained model on the task's test part, kept at `path`; none where there is no such part."""
    task = config.build_task(1).test()
    if task is None:
        return {}
    if not path.exists():
        precision = config.train.precision
        measured: dict[str, Any] = dict(evaluate(model, task, config.train.batch_size, precision=precision))
        if isinstance(task, ForecastTask):
            model.eval()
            measured["forecasts"] = forecasts(
                task, lambda inputs: predict(model, {"inputs": inputs.to(model.device)}, precision).cpu()
            )
        files.write_json(path, {f"test_{name}": value for name, value in measured.items()})
    kept: dict[str, Any] = files.read_json(path)
    return kept


def _save_model(model: StructuredModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise RunFolderError(folder, f"the model cannot be written: {error.strerror or error}") from error


def _differences(there: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Where two configs differ, in words."""
    if isinstance(there, dict) and isinstance(ours, dict):
        for key in sorted(there.keys() | ours.keys()):
            yield from _differences(there.get(key), ours.get(key), f"{name}.{key}" if name else str(key))
    elif there != ours:
        yield f"{name} was {there!r}, is {ours!r}"
