"""Subcommands of `python -m paper`, their options and help.

Nothing heavy is imported, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from paper.chronos.attention import COMPARED
from paper.texts import TEXTS


@dataclass(frozen=True)
class Study:
    """Reproduce a figure of the paper.

    Trains the models, draws the figure, and compares the finding with the paper's.
    """

    name: tyro.conf.Suppress[tyro.conf.Fixed[str]]
    """Name of the study, set by the subcommand."""

    preset: Literal["small", "paper"] = "small"
    """Sizes of the models: small takes an hour on two cores, paper has the paper's sizes, for GPUs."""

    out: Path = Path("runs/studies")
    """Folder of all studies. Each writes into its own subfolder; report.html shows all of them."""

    data: str | None = None
    """Text of language studies, as in compare language, by default stdlib. Series of forecast, as in compare forecast,
    by default ETTh1."""

    seeds: int = 2
    """Number of seeds of every run."""

    jobs: int = 1
    """Runs at a time: processes of this machine, or jobs of a cluster."""

    launcher: Literal["local", "slurm"] = "local"
    """Where to run: on this machine, or on a Slurm cluster through submitit."""

    partition: str | None = None
    """Partition of the cluster."""

    gpus: int = 1
    """GPUs of each job of the cluster."""

    dry_run: bool = False
    """List the runs with parameters, FLOPs and estimated time on this machine, and run none."""

    finished: bool = False
    """Train nothing: write the page from the runs that have ended."""

    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True)
class Chronos:
    """Train Chronos from scratch on synthetic series, one model per attention.

    All models read the same tokens.
    """

    out: Path
    """Folder for results, figure and checkpoints; made where it is missing."""

    attentions: tuple[str, ...] = COMPARED
    """Self-attentions to compare, spelt as in compare. standard is T5's own. A T5 neither scales its scores nor has
    norms on queries and keys, so MLR attention needs +level_weight=1+qk_norm=false."""

    size: Literal["reduced", "tiny", "mini", "small"] = "reduced"
    """Size of the model: a published one, or reduced (width 64, 2 layers, 2 heads of 32) for a CPU."""

    context_length: int = 256
    """Values of a context; 512 as published."""

    horizon: int = 32
    """Values of a forecast; 64 as published."""

    n_tokens: int = 1024
    """Bins of the tokenizer and special ids; 4096 as published."""

    steps: int = 800
    """Optimiser steps of each model."""

    batch_size: int = 16
    """Series per step."""

    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""

    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the matrix products; auto takes bfloat16 if the device has instructions for it."""

    compositions: int = 512
    """Compositions of kernels in the training set, 8 series of each."""

    evaluation_series: int = 256
    """Held-out synthetic series, each of a composition of its own."""

    samples: int = 20
    """Sample paths of a forecast."""

    seeds: int = 1
    """Number of seeds of each attention."""

    series: str | None = None
    """A real series to forecast without training on it: ETTh1, ETTh2, ETTm1, ETTm2, or a CSV file."""

    time: str = "date"
    """Its column of times."""

    columns: tuple[str, ...] = ()
    """Its columns to forecast; by default all but the times."""

    fill: Literal["forward", "linear", "drop"] | None = None
    """What to do with missing values or rows: repeat the last, interpolate, or drop. By default they are refused."""

    season: int | None = None
    """Steps of its season; by default a day for the ETT files, 24 steps for others."""

    overwrite: bool = False
    """Delete the files of another study in the folder."""

    debug: bool = False
    """Show where an error came from."""


def _subcommand(name: str) -> Any:
    text = TEXTS[name]
    description = f"{text.figure.capitalize()}: {text.question}"
    return tyro.conf.subcommand(name, default=Study(name), description=description)


Command = (
    Annotated[Study, _subcommand("bottleneck")]
    | Annotated[Study, _subcommand("width")]
    | Annotated[Study, _subcommand("compute")]
    | Annotated[Study, _subcommand("scaling")]
    | Annotated[Study, _subcommand("recipe")]
    | Annotated[Study, _subcommand("reasons")]
    | Annotated[Study, _subcommand("mup")]
    | Annotated[Study, _subcommand("ranks")]
    | Annotated[Study, _subcommand("levels")]
    | Annotated[Study, _subcommand("contexts")]
    | Annotated[Study, _subcommand("forecast")]
    | Annotated[Chronos, tyro.conf.subcommand("chronos")]
)
"""Union of all subcommands."""
