"""Train a model with one attention structure, in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from structattn.comparison import files
from structattn.layers import DegenerateNormWarning, StandardKernel
from structattn.models import StructuredModel
from structattn.tasks import Task, TaskConfig, build_task, profile_of
from structattn.tasks.profiles import profile_named
from structattn.tasks.profiles.profile import ABSENT_AT_DEFAULT
from structattn.training import NonFiniteLossError, Progress, RunFolderError, TrainConfig, TrainResult, train
from structattn.training.evaluation import evaluate, predict

_KERNEL_IF_UNNAMED: dict[str, StandardKernel] = {"standard_kernel": "torch"}
"""Kernel of a config that names none. Configs of version 0.1.0 name none."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, the same for every structure of a comparison."""

    layers: int
    dim: int
    heads: int
    positions: str = "learned"

    token_deviation: float = field(default=1.0, metadata={ABSENT_AT_DEFAULT: True})
    """Initial deviation of a language model's embedding."""

    position_deviation: float | None = field(default=None, metadata={ABSENT_AT_DEFAULT: True})
    """Initial deviation of a learned position table; by default the model's own."""


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a run."""

    attention: str
    """Spelling of the attention structure."""

    task: TaskConfig
    sizes: ModelSizes
    train: TrainConfig
    seed: int = 0
    """Seed of initialisation and data order; `train.seed` is that of dropout."""

    standard_kernel: StandardKernel = field(default="torch", kw_only=True)
    """Kernel of standard attention. With PyTorch's, a run repeats to the bit whether or not the machine has a compiled
    kernel."""

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.task.context_length

    def build_model(self) -> StructuredModel:
        """Return the untrained model, determined by config and vocabulary.

        Raises:
            TypeError, ValueError: sizes and structure do not fit each other, or the vocabulary cannot be read.
        """
        profile = profile_of(self.task)
        model = profile.model()
        fields = stored_fields(self.sizes) | profile.model_fields(self.task)
        fields["standard_kernel"] = self.standard_kernel
        config = model.config_class(attention=self.attention, context_length=self.context_length, **fields)
        with seeded(self.seed):
            return model(config)

    def build_task(self, total_steps: int) -> Task:
        """Return the task, for a run of `total_steps` training steps."""
        return build_task(self.task, seed=self.seed, total_steps=total_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-compatible values.

        PyTorch's kernel is left out: folders of studies are named after these values, and older ones know no other.
        """
        plain = dataclasses.asdict(self)
        if self.standard_kernel == _KERNEL_IF_UNNAMED["standard_kernel"]:
            del plain["standard_kernel"]
        plain["sizes"], plain["train"] = stored_fields(self.sizes), stored_fields(self.train)
        plain["task"] = {"name": profile_of(self.task).name, **stored_fields(self.task)}
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RunConfig:
        """Return the config that `to_dict` wrote."""
        task: dict[str, Any]
        training: dict[str, Any]
        task, training = (
            {name: tuple(value) if isinstance(value, list) else value for name, value in plain[part].items()}
            for part in ("task", "train")
        )
        return cls(
            plain["attention"],
            profile_named(task.pop("name")).config(**task),
            ModelSizes(**plain["sizes"]),
            TrainConfig(**training),
            plain["seed"],
            **{name: plain[name] for name in _KERNEL_IF_UNNAMED if name in plain},
        )


def stored_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON-compatible values, without later ones at their default."""
    later = {field.name: field.default for field in dataclasses.fields(config) if ABSENT_AT_DEFAULT in field.metadata}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in later or value != later[name]
    }


class Trainable(Protocol):
    """A dataclass of every setting of a run, as `execute` takes it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def attention(self) -> str:
        """Spelling of the attention structure."""

    @property
    def train(self) -> TrainConfig:
        """Budget and optimiser."""

    @property
    def seed(self) -> int:
        """Seed of initialisation and data order; `train.seed` is that of dropout."""

    def build_model(self) -> StructuredModel:
        """Return the untrained model."""

    def build_task(self, total_steps: int) -> Task:
        """Return the task, for a run of `total_steps` training steps."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values, equal for equal runs."""


Config = TypeVar("Config", bound=Trainable)


def of_seed(config: Config, seed: int) -> Config:
    """Return the config with another seed for model and training."""
    return dataclasses.replace(config, seed=seed, train=dataclasses.replace(config.train, seed=seed))


def run_name(config: Trainable) -> str:
    """Return the run's folder name, such as `mlr-16-8-8-seed0`."""
    return f"{files.safe_name(config.attention.replace(',', '-'))}-seed{config.seed}"


def execute(config: Trainable, folder: Path, progress: Progress | None = None) -> TrainResult | str:
    """Start or resume the run in `folder`, or read its result.

    The vocabulary of the task is saved in `folder/model` before training, the trained model after it. Where the task
    has a test part, the last evaluation also has its metrics, with `test_` before their names.

    Returns:
        The result. If the loss became NaN or infinite, one line that says so; such a run is over.

    Raises:
        RunFolderError: `folder` holds a run of another config, or cannot be written.
        TypeError, ValueError: the settings do not fit each other, or the data cannot be used. A new run also refuses a
            LayerNorm over two numbers or fewer; one that has started goes on.
    """
    if not (folder / "run.json").exists():
        with degenerate_norms_refused():
            config.build_model()
    recorded = config.to_dict()
    if isinstance(config, RunConfig):
        recorded |= {"standard_kernel": config.standard_kernel}
    claim(folder, "run.json", recorded)
    failure = folder / "failed.txt"
    if failure.exists():
        return failure.read_text(encoding="utf-8").strip()
    model = config.build_model()
    if isinstance(config, RunConfig):
        profile_of(config.task).keep(config.task, folder / "model")
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
    """Return the config of a finished run and its trained model.

    The task of the config takes its vocabulary from the folder.

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
    profile = profile_of(config.task)
    config = dataclasses.replace(config, task=profile.restore(config.task, folder / "model"))
    return config, profile.model().from_pretrained(folder / "model")


def claim(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Write `config` to `folder/name`, or check that file against it.

    A field that only one of them has counts as having its default: a file of an earlier version lacks later fields.

    Raises:
        RunFolderError: the file holds another config, or cannot be written.
    """
    path = folder / name
    if not path.exists():
        files.make_folder(folder)
        files.write_json(path, config)
        return
    task = config.get("task")
    parts = {"sizes": _defaults(ModelSizes), "train": _defaults(TrainConfig)}
    if task is not None:
        parts["task"] = _defaults(profile_named(task["name"]).config)
    there, ours = (_complete(_KERNEL_IF_UNNAMED | plain, parts) for plain in (files.read_json(path), config))
    change = next(_differences(there, ours), None)
    if change is not None:
        raise RunFolderError(
            folder, f"holds results of another config ({change}); choose another folder or --overwrite"
        )


@contextlib.contextmanager
def degenerate_norms_refused() -> Iterator[None]:
    """Raise ValueError where a layer inside the block warns of a norm that cannot learn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DegenerateNormWarning)
        try:
            yield
        except DegenerateNormWarning as warning:
            raise ValueError(str(warning)) from None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator inside the block; restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _test(config: Trainable, model: StructuredModel, path: Path) -> dict[str, Any]:
    """Return the metrics on the test part, if any, and store them."""
    task = config.build_task(1).test()
    if task is None:
        return {}
    if not path.exists():
        precision = config.train.precision
        measured: dict[str, Any] = dict(evaluate(model, task, config.train.batch_size, precision=precision))
        model.eval()
        measured |= task.example_predictions(
            lambda inputs: predict(model, {"inputs": inputs.to(model.device)}, precision).cpu()
        )
        files.write_json(path, {f"test_{name}": value for name, value in measured.items()})
    kept: dict[str, Any] = files.read_json(path)
    return kept


def _save_model(model: StructuredModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise RunFolderError(folder, f"the model cannot be written: {error.strerror or error}") from error


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the defaults of a dataclass as JSON-compatible values."""
    given = {field.name: field.default for field in dataclasses.fields(kind)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not dataclasses.MISSING
    }


def _complete(config: Any, parts: dict[str, dict[str, Any]]) -> Any:
    """Return a config whose absent fields in `parts` have their defaults."""
    if not isinstance(config, dict):
        return config
    whole = {name: _complete(value, parts) for name, value in config.items()}
    return {
        name: parts[name] | value if name in parts and isinstance(value, dict) else value
        for name, value in whole.items()
    }


def _differences(there: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Yield the differences of two configs; an absent field is None."""
    if isinstance(there, dict) and isinstance(ours, dict):
        for key in sorted(there.keys() | ours.keys()):
            yield from _differences(there.get(key), ours.get(key), f"{name}.{key}" if name else str(key))
    elif there != ours:
        yield f"{name} was {there!r}, is {ours!r}"
