"""Define the options of `compare` and `train`, shared and by task.

Imports nothing heavy, so that `--help` is quick. An option sets the config's field of its name, or of its name in
`OPTION_NAMES`. None leaves the field to the preset.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import tyro

from structattn.tasks.profiles import TaskCommand, TaskProfile

Value = TypeVar("Value")


_SHORTER = {"context_length": ("--context",)}

OPTION_NAMES = {"tokens": "train-tokens", "tokenizer": "tokens"}
"""Name of each option that is not called like its field."""


def _default(words: str) -> Any:
    """Return the annotation that makes help show `(default: …)`."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})")


OfPreset = Annotated[Value | None, tyro.conf.DisallowNone, _default("the preset's")]
"""Type of an option that the preset decides if it is not given."""


@dataclass(frozen=True)
class TaskOptions:
    """Options that all tasks share.

    They are declared, not derived: `TrainConfig` has many fields that are no option, and importing it imports torch.
    """

    profile: ClassVar[TaskProfile]
    """The task."""

    command: ClassVar[TaskCommand]
    """Its part of the profile."""

    out: Path
    """Folder for results, figures, report and checkpoints; made if missing."""

    steps: OfPreset[int] = None
    """Budget: optimiser steps. Give at most one budget."""

    tokens: Annotated[OfPreset[float], tyro.conf.arg(name=OPTION_NAMES["tokens"])] = None
    """Budget: tokens trained on, such as 6e6."""

    flops: OfPreset[float] = None
    """Budget: training FLOPs of each model, such as 2e13; equal compute for every structure."""

    minutes: OfPreset[float] = None
    """Budget: minutes of training for each model. Such a run is not reproducible to the bit."""

    seeds: int = 1
    """Runs of each structure; from 2 on, results carry a standard error."""

    layers: OfPreset[int] = None
    """Transformer layers."""

    dim: OfPreset[int] = None
    """Model width D."""

    heads: OfPreset[int] = None
    """Attention heads."""

    batch_size: OfPreset[int] = None
    """Sequences per step."""

    learning_rate: OfPreset[float] = None
    """Peak learning rate of AdamW."""

    schedule: Annotated[OfPreset[Literal["cosine", "constant"]], _default("the preset's, else cosine")] = None
    """Learning rate after the warm-up."""

    mup: Annotated[OfPreset[Literal["on", "off"]], _default("the preset's, else on")] = None
    """muP: learning rates of matrices fall with their fan-in, so that one rate serves every width."""

    positions: Annotated[OfPreset[Literal["learned", "rotary"]], _default("the preset's, else learned")] = None
    """Learned position table, or rotary embedding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto is bfloat16 where the device has instructions for it."""

    standard_kernel: Literal["torch", "auto", "compiled"] = "torch"
    """Kernel of standard attention: PyTorch's, the faster one, or this package's. It changes times, and results by
    rounding."""

    compile: bool = False
    """Compile the model with torch.compile."""

    tensorboard: bool = False
    """Write metrics for TensorBoard too."""

    wandb: bool = False
    """Send metrics to Weights & Biases too."""

    overwrite: bool = False
    """Start anew: delete all results and checkpoints in the folder first, also those of the same settings."""

    debug: bool = False
    """Show the traceback of an error."""

    preset: str = ""
    """Name of the preset; each task adds its default and help."""


Option = tuple[str, Any, Any]
"""Name, annotated type and default of an option, as `dataclasses.make_dataclass` takes them."""


def compare_options(profile: TaskProfile, command: TaskCommand) -> type[TaskOptions]:
    """Return the options of `compare` for a task, as a dataclass."""
    words = f"Structures to compare: {command.examples}"
    return _options(profile, command, _option("attentions", tuple[str, ...], words, default=command.compared))


def train_options(profile: TaskProfile, command: TaskCommand) -> type[TaskOptions]:
    """Return the options of `train` for a task, as a dataclass."""
    words = f"Structure of the model's attention: {command.examples}"
    return _options(profile, command, _option("attention", str, words, default=command.trained))


def structures(options: Any) -> tuple[str, ...]:
    """Return the structures of a comparison, or the one of a training."""
    return options.attentions if hasattr(options, "attentions") else (options.attention,)


def _options(profile: TaskProfile, command: TaskCommand, attention: Option) -> type[TaskOptions]:
    """Return the shared options, those of the task's config, and `attention`.

    Raises:
        ValueError: a field of the config has the name of a shared option.
    """
    options = [*_config_options(profile.config, command), attention]
    shared = {field.name for field in dataclasses.fields(TaskOptions)}
    for name, *_ in options:
        if name in shared:
            raise ValueError(f"a field of {profile.config.__name__} must not be named as a shared option, got {name!r}")
    presets = ", ".join(command.presets)
    words = f"Sizes of the model and defaults of training: {presets}; `structattn info` lists them."
    options.append(_option("preset", str, words, default=next(iter(command.presets))))
    members = {"profile": profile, "command": command, "__doc__": command.summary}
    return dataclasses.make_dataclass(
        profile.name, options, bases=(TaskOptions,), namespace=members, frozen=True, kw_only=True
    )


def _config_options(config: type[Any], command: TaskCommand) -> Iterator[Option]:
    """Yield an option for each field that the task does not hide."""
    kinds, docs = get_type_hints(config), _field_docs(config)
    chosen, preset = next(iter(command.presets.items()))
    elsewhere = {name: f"the preset's, {value} for {chosen}" for name, value in preset.items()} | dict(command.derived)
    for field in dataclasses.fields(config):
        name, kind, words = field.name, kinds[field.name], docs.get(field.name, "").replace("`", "")
        if name in command.hidden:
            continue
        if name in elsewhere:
            kind = Annotated[kind | None, tyro.conf.DisallowNone, _default(elsewhere[name])]
            yield _option(name, kind, words, default=None)
        else:
            yield _option(name, kind, words, default=field.default)


def _option(name: str, kind: Any, words: str, *, default: Any) -> Option:
    note = tyro.conf.arg(name=OPTION_NAMES.get(name), help=words, aliases=_SHORTER.get(name))
    return name, Annotated[kind, note], dataclasses.field(default=default)


def _field_docs(config: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, in one line."""
    definition: Any = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    return {
        line.target.id: inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")
        for line, text in itertools.pairwise(definition.body)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr)
    }
