"""Figure and table of the study of Chronos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from paper.chronos.data import Metrics
from paper.chronos.study import ChronosResults, ChronosRun
from structattn.comparison import files
from structattn.comparison.numbers import grouped, magnitude
from structattn.drawing.style import TRAINING_FLOPS, new_figure, pens, save_figure, styled, two_lines
from structattn.reporting.table import markdown_row
from structattn.reporting.terminal import terminal_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = {"WQL": "wql", "MASE": "mase", "median MASE": "mase_median"}


def draw_chronos(results: ChronosResults, folder: Path, name: str = "loss-flops") -> Figure:
    """Draw validation loss against training FLOPs and against tokens.

    The files are `name.png` and `name.svg` in `folder`.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        RunFolderError: a file cannot be written.
    """
    with styled():
        figure = new_figure(8.8, 3.4)
        for place, (column, label) in enumerate([(1, two_lines(TRAINING_FLOPS)), (0, "tokens")], start=1):
            _panel(figure.add_subplot(1, 2, place), results, column, label)
    files.make_folder(folder)
    save_figure(figure, folder, name)
    return figure


def _panel(axes: Axes, results: ChronosResults, column: int, label: str) -> None:
    pen_of = pens(list(dict.fromkeys(run.attention for run in results.runs)))
    for run in results.runs:
        pen = pen_of[run.attention]
        points = [(point[column], point[2]) for point in run.curve]
        name = run.attention if run.seed == 0 else None
        axes.plot(*zip(*points, strict=True), color=pen.colour, linestyle=pen.dash, linewidth=1.4, label=name)
    axes.set(xlabel=label, ylabel="validation loss, nats per token")
    axes.legend(frameon=False, fontsize=7.5)


def chronos_markdown(results: ChronosResults) -> str:
    """Return costs and metrics of all models and baselines in Markdown."""
    heading, rows = _rows(results)
    lines = [heading, ["---"] * len(heading)]
    lines += [[f"`{row[0]}`", *row[1:]] if row[1] else row for row in rows]
    return "\n".join(map(markdown_row, lines))


def chronos_table(results: ChronosResults) -> Table:
    """Return the table of `chronos_markdown` for the terminal."""
    return terminal_table(*_rows(results))


def _rows(results: ChronosResults) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the cells of each run and baseline."""
    first = results.runs[0]
    columns: dict[str, Callable[[ChronosRun], str]] = {
        "attention": lambda run: run.attention,
        "seed": lambda run: str(run.seed),
        "parameters": lambda run: grouped(run.parameters),
        "training FLOPs": lambda run: magnitude(run.curve[-1][1]),
        "score FLOPs": lambda run: f"{run.score_flops / first.score_flops:.0%}",
        "loss": lambda run: f"{run.loss:.4f}",
    }
    heading = [*columns, *(f"{data} {name}" for data in first.metrics for name in _METRICS)]
    rows = [[cell(run) for cell in columns.values()] + _cells(run.metrics) for run in results.runs]
    for name in dict.fromkeys(name for each in results.baselines.values() for name in each):
        known = {data: results.baselines[data].get(name) for data in first.metrics}
        rows.append([name, *[""] * (len(columns) - 1), *_cells(known)])
    return heading, rows


def _cells(metrics: Mapping[str, Metrics | None]) -> list[str]:
    return [f"{each[key]:.3f}" if each else "" for each in metrics.values() for key in _METRICS.values()]
