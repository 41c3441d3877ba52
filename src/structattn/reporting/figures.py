"""Draw a comparison's loss curves, task figures, costs and maps of pairs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from structattn import checks
from structattn.comparison import files
from structattn.comparison.numbers import grouped, magnitude
from structattn.comparison.results import Results, Run
from structattn.drawing.pairs import draw_pair_widths
from structattn.drawing.style import BASELINE, QUIET, TRAINING_FLOPS, Pen, label_ends, new_figure, pens, styled
from structattn.reporting.maps import pair_widths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_FROM = 0.1  # Share of the run: earlier losses lie far above those that tell structures apart.
_MAPS_PER_ROW = 4


@dataclass(frozen=True)
class Picture:
    """Figure of the report."""

    name: str
    """File name, without ending."""

    title: str
    caption: str
    """Content, and how to read it."""

    svg: str
    """The figure, with a transparent background."""


def draw_all(results: Results, folder: Path) -> list[Picture]:
    """Draw every figure of `results`, as PNG and SVG files in `folder`.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        RunFolderError: a file cannot be written.
    """
    with styled():
        return [_write(folder, *drawn) for drawn in _figures(results)]


def _figures(results: Results) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield name, title, caption and figure of each picture."""
    loss = (results.profile.quantity if results.curve is None else "validation error").capitalize()
    if any(run.rows for run in results.runs):
        several = len({run.seed for run in results.runs}) > 1
        seeds = "The thick line is the mean over seeds, thin lines are single seeds. " if several else ""
        how = f"{seeds}Lower is better."
        yield (
            "loss-flops",
            f"{loss} against training compute",
            f"Every structure at the same compute stands on one vertical line. {how}",
            loss_curves(results, "flops"),
        )
        yield (
            "loss-steps",
            f"{loss} against steps",
            f"At the same step every structure has seen the same data in the same order. {how}",
            loss_curves(results, "step"),
        )
    if results.ranking:
        for each in results.profile.figures:
            yield each.name, each.title, each.caption, each.draw(results)
    yield (
        "costs",
        "What each structure costs",
        f"Score FLOPs{f' and {_cached(results)}' * results.is_causal} are exact counts for a model of this size at "
        "the trained length; tokens/s is what this machine trained at, with this version of the code.",
        cost_bars(results),
    )
    if maps := pair_maps(results):
        yield (
            "depth-maps",
            "What each pair of tokens gets",
            "Dimensions of the dot product between the query in a row and the key in a column, per head. "
            "Where the map is empty the pair is not scored at all.",
            maps,
        )


def _write(folder: Path, name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Save as PNG and SVG, undated: equal results give equal files."""
    figure.canvas.draw()  # The final layout places labels beside lines.
    files.write_bytes(folder / f"{name}.png", _render(figure, "png", dpi=200))
    files.write_bytes(folder / f"{name}.svg", _render(figure, "svg", metadata={"Date": None, "Title": title}))
    transparent = _render(figure, "svg", metadata={"Date": None}, transparent=True).decode()
    return Picture(name, title, caption, transparent)


def _render(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()


# --- curves -----------------------------------------------------------------------------------------------------------


def loss_curves(results: Results, x: str) -> Figure:
    """Draw the metric of each structure against `step` or `flops`."""
    figure = new_figure(6.4, 3.4)
    axes = figure.add_subplot()
    ends = []
    for structure, pen in pens(results.structures).items():
        runs = [run for run in results.runs if run.structure == structure and run.rows]
        if runs:
            ends.append((structure, *_draw_runs(axes, runs, x, results.followed, pen), pen.colour))
    axes.set_ylabel(results.unit)
    if results.profile.is_log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        shown = {name: row[results.followed] for name, row in results.baselines.items() if row[results.followed] > 1e-4}
    else:
        shown = _near_baselines(results)
        axes.set_ylim(*_loss_limits(results))
    for name, error in shown.items():
        axes.axhline(error, color=QUIET, linestyle=BASELINE, linewidth=1)
        ends.append((name, axes.get_xlim()[1], error, QUIET))
    if x == "flops":
        axes.set_xscale("log")
        axes.set_xlabel(TRAINING_FLOPS)
        _format(axes, "x", magnitude)
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("steps")
        _format(axes, "x", grouped)
    figure.canvas.draw()
    label_ends(axes, ends)
    return figure


def _draw_runs(axes: Axes, runs: Sequence[Run], x: str, y: str, pen: Pen) -> tuple[float, float]:
    """Draw a structure's runs and their mean; return where the mean ends."""
    style: dict[str, Any] = {"color": pen.colour, "linestyle": pen.dash}
    curves = [([row[x] for row in run.rows], [row[y] for row in run.rows]) for run in runs]
    aligned = len(runs) > 1 and all(places == curves[0][0] for places, _ in curves)
    for places, values in curves:
        thin: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4} if aligned else {}
        axes.plot(places, values, **style, **thin)
    places, values = max(curves, key=lambda curve: curve[0][-1])
    if aligned:
        values = np.mean([values for _, values in curves], axis=0).tolist()
        axes.plot(places, values, **style)
    axes.plot(places[-1], values[-1], "o", color=pen.colour, markersize=4)
    return places[-1], values[-1]


def _loss_limits(results: Results) -> tuple[float, float]:
    """Return axis limits of the late curves and the baselines near them."""
    late = _late_values(results) + list(_near_baselines(results).values())
    low, high = min(late), max(late)
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin


def _late_values(results: Results) -> list[float]:
    """Return the curves' values after the first tenth of each run."""
    runs = [run for run in results.runs if run.rows]
    return [row[results.followed] for run in runs for row in run.rows if row["step"] >= _SHOWN_FROM * run.final["step"]]


def _near_baselines(results: Results) -> dict[str, float]:
    """Return baselines near the curves; others would flatten them."""
    low, high = min(_late_values(results)), max(_late_values(results))
    values = {name: row[results.followed] for name, row in results.baselines.items()}
    return {name: value for name, value in values.items() if 2 * low - high <= value <= 2 * high - low}


# --- costs and maps ---------------------------------------------------------------------------------------------------


def _cached(results: Results) -> str:
    return "cache numbers" if results.counts_values else "key numbers"


def cost_bars(results: Results) -> Figure:
    """Draw score FLOPs, cache numbers and speed, a bar for each structure."""
    names = list(results.structures)
    panels = [("score FLOPs per token", [results.costs[name].score_flops_per_token for name in names], magnitude)]
    if results.is_causal:
        panels.append((f"{_cached(results)} per token", list(map(results.cached_per_token, names)), grouped))
    panels.append(("tokens/s in training", [results.tokens_per_second(name) for name in names], grouped))
    figure = new_figure(7.4, 0.75 + 0.34 * len(names))
    colours = [pen.colour for pen in pens(names).values()]
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.barh(range(len(names)), values, color=colours, height=0.62)
        for place, value in enumerate(values):
            text = form(value) if value else "no result"
            axes.text(value, place, f" {text}", va="center", fontsize=8.5)
        axes.set_title(title)
        axes.set_xlim(0, max(1.25 * max(values), 1e-9))
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return figure


def pair_maps(results: Results) -> Figure | None:
    """Draw each pair of tokens' dimensions; None if all are equal."""
    widths = {name: pair_widths(name, results.sizes) for name in results.structures}
    shown = {name: width for name, width in widths.items() if width is not None}
    scored = {name: np.tri(len(width), dtype=bool) | (not results.is_causal) for name, width in shown.items()}
    if not any(len(np.unique(width[scored[name]])) > 1 for name, width in shown.items()):
        return None
    rows = -(-len(shown) // _MAPS_PER_ROW)
    columns = min(len(shown), _MAPS_PER_ROW)
    figure = new_figure(0.8 + 2.1 * columns, 2.45 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    length, most = results.sizes["context_length"], max(width.max() for width in shown.values())
    for axes, (name, width) in zip(grid.flat, shown.items(), strict=False):
        unscored = ~scored[name] | (width == 0)
        image = draw_pair_widths(axes, np.ma.masked_where(unscored, width), length, most)
        axes.set(title=name, xticks=[0, length], yticks=[0, length])
        axes.grid(False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("key", labelpad=-8)
    for axes in grid[:, 0]:
        axes.set_ylabel("query", labelpad=-12)
    figure.colorbar(image, ax=grid, label="dimensions", shrink=0.8, aspect=18)
    return figure


def _format(axes: Axes, axis: str, form: Callable[[float], str]) -> None:
    """Format the numbers of an axis like the table."""
    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_major_formatter(lambda value, _: form(value))
    if which.get_scale() == "log":
        low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
        ticker = checks.require("matplotlib.ticker", "plot")
        subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
        # In a narrow range LogLocator would crowd the axis.
        which.set_major_locator(ticker.MaxNLocator(4) if high / low < 5 else ticker.LogLocator(subs=subs))
        which.set_minor_formatter(ticker.NullFormatter())
