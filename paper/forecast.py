"""Gain of levels in forecasting, and Chronos's loss against FLOPs (figure 15)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from paper.chronos.attention import spelling
from paper.chronos.run import REDUCED, ChronosRunConfig, chronos_training
from paper.chronos.task import ChronosDataConfig
from paper.chronos.verdict import chronos_verdict
from paper.drawing import draw_curves
from paper.evidence import all_true, label_values, with_label
from paper.gains import describe_gains, draw_gains, gains
from paper.study import Finding, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.run import ModelSizes, RunConfig
from structattn.drawing.style import REFERENCE, TRAINING_FLOPS, new_figure, styled
from structattn.tasks import ForecastConfig
from structattn.training import FORECAST_PRESETS, TrainConfig, preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

CONTEXTS = (96, 192, 336, 512)
HORIZONS = (96, 192, 336)
_STRUCTURES = (REFERENCE, "mlr+paper+levels=2", "mlr+paper+levels=4")
_SERIES, _CHRONOS = "series", "Chronos"


class Forecast(Study):
    """Figure 15: forecasts over contexts, and Chronos trained from scratch."""

    name = "forecast"
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Encoders of 2 layers and width 64, 160 steps of 16 windows. Chronos of width 64 with 2 layers on each "
            "side, 256 values of context and 32 of horizon, 800 steps of 16 series."
        ),
        "paper": (
            "Encoders of 2 layers and width 512, 1,000 steps of 32 windows. Chronos tiny, mini and small as published, "
            "200,000 steps of 256 series."
        ),
    }
    data = "ETTh1"

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train encoders over contexts and horizons, then Chronos, all for equal steps."""
        row = preset("paper" if scale == "paper" else "small", FORECAST_PRESETS)
        sizes = ModelSizes(row.layers, row.dim, row.heads)
        steps, batch = {"small": (160, 16), "paper": (1_000, 32)}[scale]
        train = TrainConfig(steps=steps, batch_size=batch, learning_rate=row.learning_rate)
        forecasts = [
            Trial(
                RunConfig(name, ForecastConfig(data, context, horizon), sizes, train),
                {"part": _SERIES, "structure": name, "context": context, "horizon": horizon},
            )
            for horizon in HORIZONS
            for context in CONTEXTS
            for name in _STRUCTURES
        ]
        return with_seeds([*forecasts, *_chronos_trials(scale)], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot gain against context, and Chronos's loss against FLOPs.

        The upper row has a panel for each horizon, the lower one for each size of Chronos.
        """
        with styled():
            figure = new_figure(8.4, 5.6)
            upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
            _draw_series(upper, with_label(outcomes, part=_SERIES))
            _draw_chronos(lower, with_label(outcomes, part=_CHRONOS))
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Describe the gain over contexts, and Chronos's FLOPs."""
        series, grows = describe_gains(gains(with_label(outcomes, part=_SERIES)))
        chronos, saves = _describe_chronos(with_label(outcomes, part=_CHRONOS))
        return Finding(f"{series} {chronos}", all_true([grows, saves]))


def _chronos_trials(scale: Scale) -> list[Trial]:
    run = ChronosRunConfig()
    if scale == "small":
        sizes: tuple[Any, ...] = (REDUCED,)
        attentions = (REFERENCE, "mlr:16|16", "mlr:8|8|8|8")
    else:  # As published (Ansari et al., 2024): sizes, lengths, bins, batch and steps.
        sizes = ("tiny", "mini", "small")
        attentions = (REFERENCE, "mlr:32|32", "mlr:16|16|16|16")
        run = dataclasses.replace(
            run,
            context_length=512,
            prediction_length=64,
            n_tokens=4096,
            dropout=0.1,
            initializer_factor=0.05,
            data=ChronosDataConfig(compositions=16_384),
            train=chronos_training(200_000, batch_size=256, learning_rate=1e-3),
        )
    return [
        Trial(
            dataclasses.replace(run, size=size, attention=spelling(name)),
            {"part": _CHRONOS, "structure": name, "size": size if isinstance(size, str) else "reduced"},
        )
        for size in sizes
        for name in attentions
    ]


def _draw_series(figure: SubFigure, outcomes: Sequence[Outcome]) -> None:
    found = gains(outcomes)
    horizons = sorted({gain.horizon for gain in found})
    panels = figure.subplots(1, max(1, len(horizons)), sharey=True, squeeze=False)[0]
    for axes, horizon in zip(panels, horizons, strict=False):
        draw_gains(axes, [gain for gain in found if gain.horizon == horizon])
        axes.set(title=f"horizon {horizon}", xlabel="steps of context")
    panels[0].set_ylabel("lower MAE of the target, %")


def _draw_chronos(figure: SubFigure, outcomes: Sequence[Outcome]) -> None:
    sizes = label_values(outcomes, "size")
    for axes, size in zip(figure.subplots(1, max(1, len(sizes)), squeeze=False)[0], sizes, strict=False):
        draw_curves(axes, with_label(outcomes, size=size))
        axes.set(title=f"Chronos, {size}", xlabel=TRAINING_FLOPS, ylabel="nats per token")


def _describe_chronos(outcomes: Sequence[Outcome]) -> tuple[str, bool | None]:
    """Describe Chronos's losses and FLOPs.

    Returns the words, and True if MLR attention always saves compute.
    """
    parts, saves = [], list[bool | None]()
    ended = [outcome for outcome in outcomes if outcome.rows]
    for size in label_values(ended, "size"):
        curves = {
            (str(each.labels["structure"]), int(each.labels["seed"])): [
                (row["flops"], row["nats_per_token"]) for row in each.rows
            ]
            for each in with_label(ended, size=size)
        }
        words, saves_of_size = chronos_verdict(curves)
        saves += saves_of_size
        parts.append(f"Chronos, {size} size, nats per token at the end: {words}.")
    if not saves:
        return "Too few models of Chronos ended to compare.", None
    return f"{' '.join(parts)} ± is the standard error over seeds.", all_true(saves)
