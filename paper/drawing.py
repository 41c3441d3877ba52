"""Plots that several studies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paper.evidence import with_label
from paper.study import Outcome, metric
from structattn.comparison.estimate import Estimate
from structattn.drawing.style import QUIET, TRAINING_FLOPS, new_figure, pens, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Evaluations before this share of the training FLOPs are not drawn: their losses lie far above the others.
_FIRST_SHARE = 0.05

Line = Sequence[tuple[float, Estimate]]
"""Points of a line: x, and the estimate of y."""


def plot_estimates(
    lines: Mapping[str, Line],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    vertical_line: float | None = None,
) -> Figure:
    """Plot lines of means with error bars.

    A bar is one standard error over seeds.

    Args:
        lines: points of each line by its name, in ascending order.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        log_x: logarithmic x axis, with a tick at each point.
        vertical_line: x of a dotted vertical line.
    """
    with styled():
        figure = new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        draw_estimates(axes, lines)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log_x:
            set_log2_ticks(axes, sorted({x for line in lines.values() for x, _ in line}))
        if vertical_line is not None:
            axes.axvline(vertical_line, color=QUIET, linewidth=0.8, linestyle=":")
    return figure


def draw_estimates(axes: Axes, lines: Mapping[str, Line]) -> None:
    """Draw the lines of `plot_estimates` into given axes."""
    for name, pen in pens(list(lines)).items():
        points = lines[name]
        x, y = [each[0] for each in points], [each[1].mean for each in points]
        bars = [each[1].standard_error or 0.0 for each in points]
        axes.errorbar(
            x, y, yerr=bars, fmt="o", linestyle=pen.dash, color=pen.colour, markersize=3.5, capsize=2, label=name
        )
    axes.legend(frameon=False, fontsize=8)


def set_log2_ticks(axes: Axes, points: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks only at the given points."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(points, [f"{x:g}" for x in points])
    axes.minorticks_off()


def plot_curves(outcomes: Sequence[Outcome], *, ylabel: str) -> Figure:
    """Plot the metric of every evaluation against training FLOPs.

    Each trial has a line, each structure a colour.
    """
    with styled():
        figure = new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        draw_curves(axes, outcomes)
        axes.set(xlabel=TRAINING_FLOPS, ylabel=ylabel)
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=6.5)
    return figure


def draw_curves(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw the lines of `plot_curves` into given axes."""
    structures = list(dict.fromkeys(str(outcome.labels["structure"]) for outcome in outcomes))
    for structure, pen in pens(structures).items():
        ended = [outcome for outcome in with_label(outcomes, structure=structure) if outcome.rows]
        for index, outcome in enumerate(ended):
            rows = [row for row in outcome.rows if row["flops"] >= _FIRST_SHARE * outcome.flops]
            label = structure if index == 0 else None  # one entry of the legend per structure
            axes.plot(
                [row["flops"] for row in rows],
                [metric(row) for row in rows],
                color=pen.colour,
                linestyle=pen.dash,
                linewidth=1.2,
                label=label,
            )
    axes.legend(frameon=False, fontsize=8)
