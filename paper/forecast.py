"""Forecasting: the gain of levels against the length of a series, and Chronos's loss against FLOPs (figure 15)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paper.chronos.run import REDUCED, ChronosRunConfig, chronos_training
from paper.chronos.task import ChronosDataConfig
from paper.chronos.verdict import chronos_verdict
from paper.drawing import draw_curves
from paper.study import Finding, Label, Outcome, Scale, Study, Trial, all_of, with_seeds
from structattn.studies.estimate import Estimate, above_zero
from structattn.studies.run import ModelSizes, RunConfig
from structattn.studies.style import QUIET, new_figure, pens, styled
from structattn.studies.verdict import REFERENCE
from structattn.tasks import ForecastConfig
from structattn.training import FORECAST_PRESETS, TrainConfig, preset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTEXTS = (96, 192, 336, 512)
HORIZONS = (96, 192, 336)
_STRUCTURES = (REFERENCE, "mlr+levels=2", "mlr+levels=4")
_SERIES, _CHRONOS = "series", "Chronos"


class Forecast(Study):
    """Figure 15."""

    name = "forecast"
    title = "Does the gain of levels grow with the length of a series?"
    question = (
        "How much lower than standard attention's is the error of the target under MLR attention, the farther a "
        "forecast looks back; and does Chronos, trained from scratch with equal tokens, need less compute with it?"
    )
    reported = (
        "On ETTh1 the gain of MLR attention over standard attention in the error of the oil temperature grows with the "
        "length of the context; Chronos with MLR attention reaches the same validation loss with fewer FLOPs."
    )
    figure = "figure 15"
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Encoders of 2 layers and width 64, 160 steps of 16 windows; Chronos of width 64 with 2 layers on each "
            "side, 256 values of context and 32 of horizon, 800 steps of 16 series."
        ),
        "paper": (
            "Encoders of 2 layers and width 512, 1,000 steps of 32 windows; Chronos tiny, mini and small as published, "
            "200,000 steps of 256 series."
        ),
    }
    data = "ETTh1"

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Encoders over contexts and horizons, then Chronos from scratch; equal steps for all structures."""
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
        """Gain against context, a panel for each horizon; below, Chronos's validation loss against FLOPs."""
        found = gains(outcomes)
        horizons = sorted({gain.horizon for gain in found})
        with styled():
            figure = new_figure(8.4, 5.6)
            above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
            panels = above.subplots(1, max(1, len(horizons)), sharey=True, squeeze=False)[0]
            for axes, horizon in zip(panels, horizons, strict=False):
                _draw_gains(axes, [gain for gain in found if gain.horizon == horizon])
                axes.set(title=f"horizon {horizon}", xlabel="steps of context")
            panels[0].set_ylabel("lower MAE of the target, %")
            chronos = [outcome for outcome in outcomes if outcome.labels["part"] == _CHRONOS]
            sizes = list(dict.fromkeys(str(outcome.labels["size"]) for outcome in chronos))
            for axes, size in zip(below.subplots(1, max(1, len(sizes)), squeeze=False)[0], sizes, strict=False):
                draw_curves(axes, [each for each in chronos if each.labels["size"] == size], "structure")
                axes.set(title=f"Chronos, {size}", xlabel="training FLOPs", ylabel="nats per token")
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """How the gain changes with the context, and what compute Chronos needs."""
        series, grows = _gain_sentence(gains(outcomes))
        chronos, saves = _chronos_sentence([each for each in outcomes if each.labels["part"] == _CHRONOS])
        return Finding(f"{series} {chronos}", all_of([grows, saves]))


@dataclass(frozen=True)
class Gain:
    """How much lower the error of a structure is than standard attention's, of one seed: `100 (1 - e / e_standard)`."""

    structure: str
    horizon: int
    context: int
    seed: int
    percent: float


def gains(outcomes: Sequence[Outcome]) -> list[Gain]:
    """The gain of every run over that of standard attention which saw the same data in the same order."""
    errors = {
        (each.labels["structure"], each.labels["horizon"], each.labels["context"], each.labels["seed"]): each.loss
        for each in outcomes
        if each.labels["part"] == _SERIES and each.rows
    }
    return [
        Gain(str(structure), int(horizon), int(context), int(seed), 100 * (1 - error / beside))
        for (structure, horizon, context, seed), error in errors.items()
        if structure != REFERENCE and (beside := errors.get((REFERENCE, horizon, context, seed))) is not None
    ]


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
            dataclasses.replace(run, size=size, attention=name),
            {"part": _CHRONOS, "structure": name, "size": size if isinstance(size, str) else "reduced"},
        )
        for size in sizes
        for name in attentions
    ]


def _draw_gains(axes: Axes, found: Sequence[Gain]) -> None:
    """A line for each structure, with 95% intervals over seeds."""
    structures = list(dict.fromkeys(gain.structure for gain in found))
    lengths = sorted({gain.context for gain in found})
    axes.axhline(0, color=QUIET, linewidth=1)
    for place, (structure, pen) in enumerate(pens(structures).items()):
        points = [(length, _over_seeds(found, structure, length)) for length in lengths]
        known = [(length, each) for length, each in points if each is not None]
        aside = 1 + 0.03 * (place - (len(structures) - 1) / 2)  # so that error bars do not hide one another
        axes.errorbar(
            [aside * length for length, _ in known],
            [each.mean for _, each in known],
            yerr=[each.margin or 0.0 for _, each in known],
            fmt="o-",
            color=pen.colour,
            markersize=4,
            capsize=3,
            label=structure,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, list(map(str, lengths)))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def _over_seeds(found: Sequence[Gain], structure: str, context: int) -> Estimate | None:
    """Mean over seeds of the gain, itself a mean over horizons."""
    by_seed: dict[int, list[float]] = {}
    for gain in found:
        if (gain.structure, gain.context) == (structure, context):
            by_seed.setdefault(gain.seed, []).append(gain.percent)
    return Estimate.of([statistics.fmean(each) for each in by_seed.values()]) if by_seed else None


def _slopes(found: Sequence[Gain], structure: str) -> list[float]:
    """For each seed, how many percentage points of gain a doubling of the context brings (least squares)."""
    slopes = []
    for seed in sorted({each.seed for each in found}):
        points = [
            (math.log2(gain.context), gain.percent)
            for gain in found
            if (gain.structure, gain.seed) == (structure, seed)
        ]
        if len({x for x, _ in points}) > 1:
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return slopes


def _gain_sentence(found: Sequence[Gain]) -> tuple[str, bool | None]:
    said, grows = [], []
    for structure in dict.fromkeys(gain.structure for gain in found):
        slopes = _slopes(found, structure)
        longest = max(gain.context for gain in found if gain.structure == structure)
        there = _over_seeds(found, structure, longest)
        if slopes and there is not None:
            slope = Estimate.of(slopes)
            said.append(
                f"{structure} {_percent(there)} at context {longest}, and {_percent(slope)} more with each doubling"
            )
            grows.append(above_zero(slope))
    if not said:
        return "Too few forecasts ended to compare contexts.", None
    return (
        f"Gain over {REFERENCE} in the target's error, mean over horizons with its 95% interval: {'; '.join(said)}.",
        all_of(grows),
    )


def _chronos_sentence(outcomes: Sequence[Outcome]) -> tuple[str, bool | None]:
    sizes: dict[Label, dict[tuple[str, int], list[tuple[float, float]]]] = {}
    for each in outcomes:
        if each.rows:
            key = str(each.labels["structure"]), int(each.labels["seed"])
            curve = [(row["flops"], row["nats_per_token"]) for row in each.rows]
            sizes.setdefault(each.labels["size"], {})[key] = curve
    said, saves = [], list[bool | None]()
    for size, curves in sizes.items():
        words, each_saves = chronos_verdict(curves)
        saves += each_saves
        said.append(f"Chronos, {size}, ends with nats per token of {words}")
    if not saves:
        return "Too few models of Chronos ended to compare.", None
    return f"{'; '.join(said)} (±: standard error over seeds).", all_of(saves)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:+.1f}%" + ("" if estimate.margin is None else f" ± {estimate.margin:.1f}")
