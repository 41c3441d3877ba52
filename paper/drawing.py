"""What the figures of studies are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper.study import Outcome, metric
from structattn.studies.estimate import Estimate
from structattn.studies.style import QUIET, new_figure, pens, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FROM_SHARE = 0.05

Line = Sequence[tuple[float, Estimate]]


def estimate_lines(
    lines: Mapping[str, Line],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    mark: float | None = None,
) -> Figure:
    """Lines of means, with bars of one standard error over seeds.

    Args:
        lines: for each name its points, in ascending order.
        xlabel: of the axis.
        ylabel: of the axis.
        log_x: logarithmic, with a tick at each point.
        mark: where to draw a vertical line.
    """
    with styled():
        figure = new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        draw_lines(axes, lines)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log_x:
            points = sorted({x for line in lines.values() for x, _ in line})
            axes.set_xscale("log", base=2)
            axes.set_xticks(points, [f"{x:g}" for x in points])
            axes.minorticks_off()
        if mark is not None:
            axes.axvline(mark, color=QUIET, linewidth=0.8, linestyle=":")
    return figure


def draw_lines(axes: Axes, lines: Mapping[str, Line]) -> None:
    """The lines of `estimate_lines` in given axes."""
    for name, pen in pens(list(lines)).items():
        points = lines[name]
        x, y = [each[0] for each in points], [each[1].mean for each in points]
        bars = [each[1].standard_error or 0.0 for each in points]
        axes.errorbar(
            x, y, yerr=bars, fmt="o", linestyle=pen.dash, color=pen.colour, markersize=3.5, capsize=2, label=name
        )
    axes.legend(frameon=False, fontsize=8)


def curves(outcomes: Sequence[Outcome], by: str, *, ylabel: str) -> Figure:
    """Every evaluation against training FLOPs: a colour for each value of a label, a line for each trial."""
    with styled():
        figure = new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        draw_curves(axes, outcomes, by)
        axes.set(xlabel="training FLOPs", ylabel=ylabel)
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=6.5)
    return figure


def draw_curves(axes: Axes, outcomes: Sequence[Outcome], by: str) -> None:
    """The lines of `curves` in given axes, without the first evaluations, which lie far above."""
    names = list(dict.fromkeys(str(outcome.labels[by]) for outcome in outcomes))
    for name, pen in pens(names).items():
        label: Any = name
        for outcome in outcomes:
            if str(outcome.labels[by]) == name and outcome.rows:
                rows = [row for row in outcome.rows if row["flops"] >= _FROM_SHARE * outcome.flops]
                flops, metrics = [row["flops"] for row in rows], [metric(row) for row in rows]
                axes.plot(flops, metrics, color=pen.colour, linestyle=pen.dash, linewidth=1.2, label=label)
                label = None
    axes.legend(frameon=False, fontsize=8)
