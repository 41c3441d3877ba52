"""Gain of levels in forecasting: relative fall of the error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paper.drawing import set_log2_ticks
from paper.evidence import all_true
from paper.study import Outcome
from structattn.comparison.estimate import Estimate, above_zero
from structattn.drawing.style import QUIET, REFERENCE, pens

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Gain:
    """Gain of one run over standard attention with the same seed: `100 (1 - error / error_standard)`."""

    structure: str
    horizon: int
    context: int
    seed: int
    percent: float


def gains(outcomes: Sequence[Outcome]) -> list[Gain]:
    """Return the gain of every run over standard attention.

    Both runs of a pair have the same seed, so they read the same data in the same order. A run without its standard
    counterpart has no gain.
    """
    errors = {
        (each.labels["structure"], each.labels["horizon"], each.labels["context"], each.labels["seed"]): each.loss
        for each in outcomes
        if each.rows
    }
    return [
        Gain(str(structure), int(horizon), int(context), int(seed), 100 * (1 - error / standard))
        for (structure, horizon, context, seed), error in errors.items()
        if structure != REFERENCE and (standard := errors.get((REFERENCE, horizon, context, seed))) is not None
    ]


def draw_gains(axes: Axes, gains: Sequence[Gain]) -> None:
    """Draw gain against context, one line per structure.

    Bars are 95% intervals over seeds.
    """
    structures = list(dict.fromkeys(gain.structure for gain in gains))
    contexts = sorted({gain.context for gain in gains})
    axes.axhline(0, color=QUIET, linewidth=1)
    for index, (structure, pen) in enumerate(pens(structures).items()):
        points = [(context, _mean_gain(gains, structure, context)) for context in contexts]
        known = [(context, each) for context, each in points if each is not None]
        shift = 1 + 0.03 * (index - (len(structures) - 1) / 2)  # so that error bars do not hide each other
        axes.errorbar(
            [shift * context for context, _ in known],
            [each.mean for _, each in known],
            yerr=[each.margin or 0.0 for _, each in known],
            fmt="o-",
            color=pen.colour,
            markersize=4,
            capsize=3,
            label=structure,
        )
    set_log2_ticks(axes, contexts)
    axes.legend(frameon=False, fontsize=8)


def describe_gains(gains: Sequence[Gain]) -> tuple[str, bool | None]:
    """Describe the gain over contexts.

    Returns the words, and True if the gain grows for every structure.
    """
    parts, grows = [], []
    for structure in dict.fromkeys(gain.structure for gain in gains):
        slopes = _slopes(gains, structure)
        longest = max(gain.context for gain in gains if gain.structure == structure)
        at_longest = _mean_gain(gains, structure, longest)
        if slopes and at_longest is not None:
            slope = Estimate.of(slopes)
            parts.append(
                f"{structure} {_percent(at_longest)} at context {longest}, {_percent(slope)} per doubling of the "
                "context"
            )
            grows.append(above_zero(slope))
    if not parts:
        return "Too few forecasts ended to compare contexts.", None
    return (
        f"Gain over {REFERENCE} in the target's error, mean over horizons: {'; '.join(parts)}. ± is half the 95% "
        "interval.",
        all_true(grows),
    )


def _mean_gain(gains: Sequence[Gain], structure: str, context: int) -> Estimate | None:
    """Return the gain averaged over horizons; None without a run.

    The standard error is over seeds.
    """
    by_seed: dict[int, list[float]] = {}
    for gain in gains:
        if (gain.structure, gain.context) == (structure, context):
            by_seed.setdefault(gain.seed, []).append(gain.percent)
    return Estimate.of([statistics.fmean(each) for each in by_seed.values()]) if by_seed else None


def _slopes(gains: Sequence[Gain], structure: str) -> list[float]:
    """Return, for each seed, the slope of the gain over contexts.

    In percentage points per doubling of the context, by least squares.
    """
    slopes = []
    for seed in sorted({each.seed for each in gains}):
        points = [
            (math.log2(gain.context), gain.percent)
            for gain in gains
            if (gain.structure, gain.seed) == (structure, seed)
        ]
        if len({x for x, _ in points}) > 1:
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return slopes


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:+.1f}%" + ("" if estimate.margin is None else f" ± {estimate.margin:.1f}")
