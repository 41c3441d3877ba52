"""Draw forecasts: examples from the test part, and the target's error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from structattn.drawing.style import BASELINE, QUIET, label_ends, new_figure, pens
from structattn.tasks.profiles.profile import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forecast_panels(results: Findings) -> Figure:
    """Draw history, truth and forecasts of the target on each example."""
    import numpy as np

    figure = new_figure(7.4, 0.4 + 1.9 * len(results.examples))
    drawn = pens(results.structures)
    for place, (axes, example) in enumerate(
        zip(figure.subplots(len(results.examples), 1, squeeze=False).flat, results.examples, strict=True)
    ):
        history, truth = (np.array(example[part], dtype=float) for part in ("history", "truth"))
        axes.plot(range(-len(history), len(truth)), [*history, *truth], color=QUIET, linewidth=1.2)
        ahead = range(len(truth))
        ends = [("truth", ahead[-1], truth[np.isfinite(truth)][-1], QUIET)] if np.isfinite(truth).any() else []
        if (row := results.baselines.get("linear")) is not None:
            predicted = row["test_forecasts"][place]
            axes.plot(ahead, predicted, color=QUIET, linestyle=BASELINE, linewidth=1)
            ends.append(("linear", ahead[-1], predicted[-1], QUIET))
        for structure in results.ranking:
            predicted = results.finished(structure)[0].final["test_forecasts"][place]
            axes.plot(ahead, predicted, color=drawn[structure].colour, linestyle=drawn[structure].dash, linewidth=1.3)
            ends.append((structure, ahead[-1], predicted[-1], drawn[structure].colour))
        axes.axvline(-0.5, color=QUIET, linewidth=0.8)
        axes.set(title=f"from {example['begins']}", xlim=(-len(history), len(truth) - 1))
        figure.canvas.draw()
        label_ends(axes, ends, gap=0.13)
    axes.set_xlabel("steps ahead")
    figure.supylabel("target, in its unit", fontsize=9)
    return figure


def target_errors(results: Findings) -> Figure:
    """Draw the target's error: seeds, mean and interval; baselines as lines."""
    column, names = "test_target_mae", results.ranking
    rows = [*names, *results.baselines]
    figure = new_figure(6.4, 0.7 + 0.3 * len(rows))
    axes = figure.add_subplot()
    drawn = pens(results.structures)
    for place, name in enumerate(names):
        values = [run.final[column] for run in results.finished(name)]
        estimate = results.estimate(name, column)
        axes.plot(values, [place] * len(values), "o", color=drawn[name].colour, markersize=4, alpha=0.5)
        axes.errorbar(
            estimate.mean, place, xerr=estimate.margin, fmt="|", color=drawn[name].colour, markersize=12, capsize=4
        )
    for place, row in enumerate(results.baselines.values(), start=len(names)):
        axes.axvline(row[column], color=QUIET, linestyle=BASELINE, linewidth=1)
        axes.plot(row[column], place, "D", color=QUIET, markersize=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("mean absolute error of the target, standardised")
    return figure
