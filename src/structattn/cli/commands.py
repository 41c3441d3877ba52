"""Define every command and option, with its help.

Imports nothing heavy, so that `--help` is quick.

An option named like a field of a config sets that field; one that is None leaves it to the preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Training:
    """Options that all tasks share. An option that is not given has the value of the preset, or a default."""

    out: Path
    """Folder for results, figures, report and checkpoints; made if missing."""

    steps: int | None = None
    """Budget: optimiser steps. Give at most one budget."""

    tokens: float | None = None
    """Budget: tokens trained on, such as 6e6."""

    flops: float | None = None
    """Budget: training FLOPs of each model, such as 2e13; equal compute for every structure."""

    minutes: float | None = None
    """Budget: minutes of training for each model. Such a run is not reproducible to the bit."""

    seeds: int = 1
    """Runs of each structure; from 2 on, results carry a standard error."""

    layers: int | None = None
    """Blocks of the model."""

    dim: int | None = None
    """Model width D."""

    heads: int | None = None
    """Attention heads."""

    batch_size: int | None = None
    """Sequences per step."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW."""

    schedule: Literal["cosine", "constant"] | None = None
    """Learning rate after the warm-up."""

    mup: Literal["on", "off"] | None = None
    """muP: learning rates of matrices fall with their fan-in, so that one rate serves every width."""

    positions: Literal["learned", "rotary"] | None = None
    """Learned position table (default), or rotary embedding (default for language)."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto is bfloat16 where the device has instructions for it."""

    compile: bool = False
    """Compile the model with torch.compile."""

    tensorboard: bool = False
    """Write metrics for TensorBoard too."""

    wandb: bool = False
    """Send metrics to Weights & Biases too."""

    overwrite: bool = False
    """Delete the files of another comparison in the folder."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Language(Training):
    """Character-level language modelling on your text."""

    data: str = "stdlib"
    """Text: stdlib (Python's own source), a file, a folder (its .txt files), a pattern, or openwebtext."""

    preset: str = "demo"
    """Sizes of the model and defaults of training; `structattn info` lists them."""

    context_length: int | None = None
    """Characters of a training window."""


@dataclass(frozen=True)
class Regression(Training):
    """In-context linear regression: which structures can compare high-dimensional inputs."""

    input_dim: int = 8
    """Dimensions d of the inputs; a prompt has 2d points, 4d tokens."""

    curriculum: float = 0.06
    """Share of the steps over which prompts grow to full size."""


@dataclass(frozen=True)
class Forecast(Training):
    """Multivariate forecasting of a time series, ETTh1 or your own, with all steps attending to one another."""

    data: str = "ETTh1"
    """Series: ETTh1, ETTh2, ETTm1, ETTm2, or a CSV file with a column of times and columns of numbers."""

    context: int | None = None
    """Steps to look back."""

    horizon: int = 96
    """Steps to predict."""

    target: str = "OT"
    """Column with metrics of its own."""

    time: str = "date"
    """Column of times."""

    columns: tuple[str, ...] = ()
    """Columns to read and predict; all but the times by default."""

    fill: Literal["forward", "linear", "drop"] | None = None
    """For missing values and rows: repeat the last, interpolate, or leave out; refused by default."""

    season: int | None = None
    """Steps of a season, for the seasonal naive baseline; by default a day of ETT files, 24 steps of others."""

    window_norm: Literal["last", "standard", "none"] = "last"
    """Normalisation of each context, undone in its forecast: last value, mean and deviation, or none."""

    preset: str = "small"
    """Sizes of the model and defaults of training: small, for two cores, or paper."""


@dataclass(frozen=True)
class CompareLanguage(Language):
    """Character-level language modelling on your text."""

    attentions: tuple[str, ...] = ("standard", "mlr", "swa:64")
    """Structures to compare: standard, mlr, mlr:8x8, mlr:16,8,4,4, swa:64, gswa:64,16, btt, bmlr:16,8,4,4, …"""


@dataclass(frozen=True)
class CompareRegression(Regression):
    """In-context linear regression: which structures can compare high-dimensional inputs."""

    attentions: tuple[str, ...] = ("standard", "standard:1", "btt")
    """Structures to compare: standard, standard:1 (one head of full rank), btt, bmlr:2,1,1, …"""


@dataclass(frozen=True)
class CompareForecast(Forecast):
    """Multivariate forecasting of a time series, with baselines without attention."""

    attentions: tuple[str, ...] = ("standard", "mlr+levels=2", "mlr+levels=4")
    """Structures to compare: standard, mlr+levels=2, mlr:8,2,2,4, swa:32, btt, …"""


@dataclass(frozen=True)
class TrainLanguage(Language):
    """Character-level language modelling on your text."""

    attention: str = "mlr"
    """Structure of the model's attention: standard, mlr, mlr:8x8, mlr:16,8,4,4, swa:64, gswa:64,16, btt, …"""


@dataclass(frozen=True)
class TrainRegression(Regression):
    """In-context linear regression."""

    attention: str = "btt"
    """Structure of the model's attention: standard, standard:1 (one head of full rank), btt, bmlr:2,1,1, …"""


@dataclass(frozen=True)
class TrainForecast(Forecast):
    """Multivariate forecasting of a time series."""

    attention: str = "mlr+levels=4"
    """Structure of the model's attention: standard, mlr+levels=2, mlr:8,2,2,4, swa:32, btt, …"""


def structures(options: Language | Regression | Forecast) -> tuple[str, ...]:
    """Return the structures of a comparison, or the single one of a training."""
    if isinstance(options, CompareLanguage | CompareRegression | CompareForecast):
        return options.attentions
    if isinstance(options, TrainLanguage | TrainRegression | TrainForecast):
        return (options.attention,)
    raise TypeError(f"options must be those of compare or train, got {type(options).__name__}")


@dataclass(frozen=True)
class Compare:
    """Train one model per attention structure under one budget; write a table, figures and a report."""

    what: (
        Annotated[CompareLanguage, tyro.conf.subcommand("language")]
        | Annotated[CompareRegression, tyro.conf.subcommand("regression")]
        | Annotated[CompareForecast, tyro.conf.subcommand("forecast")]
    )


@dataclass(frozen=True)
class Train:
    """Train one model per seed: like `compare`, with a single structure."""

    what: (
        Annotated[TrainLanguage, tyro.conf.subcommand("language")]
        | Annotated[TrainRegression, tyro.conf.subcommand("regression")]
        | Annotated[TrainForecast, tyro.conf.subcommand("forecast")]
    )


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on held-out data of its task (a forecast: on the test part), or of other data."""

    run: Path
    """Folder of a run, or of a comparison: then its best run."""

    data: str | None = None
    """Another text or series, as for compare."""

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
    """Characters to generate."""

    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest character each time."""

    seed: int = 0
    """Seed of the sampling."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Retrofit:
    """Compress the key cache of a trained model with standard attention, and measure its loss."""

    model: Path
    """Folder of a run, of a comparison (its best run) or of a saved model: a language model with standard attention, or
    a causal one of Hugging Face transformers with its tokenizer."""

    out: Path
    """Folder for results and figure; made if missing."""

    ranks: tuple[str, ...] = ("16,8,4,4", "8x4", "4,4,8,16")
    """Level ranks to try, far pairs first; each sums to the head width. Even numbers for a rotary model."""

    data: str = "stdlib"
    """Text to calibrate, tune and evaluate on, as for compare."""

    pairs: Literal["far", "all"] = "far"
    """Pairs of tokens that the order of dimensions is measured on: far ones, or all."""

    tune_steps: int = 150
    """Steps of tuning; 0 for none."""

    tune_rate: float = 5e-4
    """Peak learning rate of tuning."""

    batch_size: int = 16
    """Sequences per step."""

    context_length: int | None = None
    """Tokens of a window for a Hugging Face model; by default 512, or all its positions. Others keep theirs."""

    overwrite: bool = False
    """Delete the files of another study in the folder."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class MupCheck:
    """Check that activations keep their size as the width grows, as muP promises; exit status 1 if not."""

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


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Retrofit, tyro.conf.subcommand("retrofit")]
    | Annotated[MupCheck, tyro.conf.subcommand("mup-check")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)
"""Any command."""

Action = Compare | Train | Evaluate | Generate | Retrofit | MupCheck
"""A command that needs models; `info` works without."""
