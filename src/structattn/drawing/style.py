"""Style every figure: a colour per structure, quiet axes, labels beside lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structattn import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE = "standard"
"""The structure that others are compared with; it is drawn in ink."""

TRAINING_FLOPS = "training FLOPs (visible pairs, forward and backward)"
"""Label of an axis that shows the count of `structattn.flops`."""

INK = "#1f2328"
"""Colour of text, axes and the reference structure. In the report it becomes the colour of the page's text."""

QUIET = "#858c94"
"""Colour of baselines, notes and grid: legible on light and on dark."""

BASELINE = (0, (4, 3))
"""Dashes of baselines."""

MAP = "cividis"
"""Colour map: even in lightness, and the same to most colour-blind eyes."""

# Those of Okabe and Ito's colours that stand out from white and from black (Color Universal Design, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))

_SETTINGS = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "structattn",
    "axes.formatter.useoffset": False,
}


def two_lines(label: str) -> str:
    """Return a label of an axis with its bracket on a line of its own, for narrow panels."""
    return label.replace(" (", "\n(")


@dataclass(frozen=True)
class Pen:
    """Colour and dashes of a structure, the same in every figure."""

    colour: str
    dash: Any


def pens(structures: Sequence[str]) -> dict[str, Pen]:
    """Return a pen per structure: ink for standard, colour for others."""
    others = [name for name in structures if name != REFERENCE]
    drawn = {
        name: Pen(_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
        for i, name in enumerate(others)
    }
    return {name: drawn.get(name, Pen(INK, "-")) for name in structures}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in this style inside the block; restore matplotlib's settings after."""
    matplotlib = checks.require("matplotlib", "plot")
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, made without pyplot."""
    figure: Figure = checks.require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write `name.png` and `name.svg` in this style into an existing folder."""
    with styled():
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}.{kind}", dpi=160)


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float = 0.062) -> None:
    """Write the name of each line beside its end, without overlaps.

    Args:
        axes: axes whose limits are set.
        ends: name, x and y of the end, and colour, of each line.
        gap: least distance between names, as a share of the height of the axes.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[float, float, str, str]] = []
    for name, x, y, colour in ends:
        at, height = to_axes.transform((x, y))
        placed.append((min(max(height, 0.0), 1.0), at, name, colour))
    heights = _apart([each[0] for each in sorted(placed)], gap)
    for (height, at, name, colour), shown in zip(sorted(placed), heights, strict=True):
        axes.annotate(
            name,
            xy=(at, height),
            xytext=(1.03, shown),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 2, "shrinkB": 3},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending `heights`, moved as little as needed to be `gap` apart.

    Neighbours that touch form a group around their mean, until no two groups touch.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
