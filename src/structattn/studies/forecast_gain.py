"""Does MLR attention gain more over standard attention the farther a forecast looks back? Comparisons side by side.

Source of the question: arXiv 2509.07963, where the gain in the error of the oil temperature grows with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from structattn.studies import files
from structattn.studies.estimate import Estimate
from structattn.studies.results import Results
from structattn.studies.style import QUIET, new_figure, pens, styled
from structattn.studies.table import table
from structattn.studies.verdict import REFERENCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = "test_target_mae"
"""Mean absolute error of the target on the test part."""


@dataclass(frozen=True)
class Gain:
    """How much lower the error of a structure is than standard attention's, at one length of context."""

    structure: str
    context_length: int

    percent: Estimate
    """`100 (e_standard - e) / e_standard`, seed by seed: runs of one seed saw the same data in the same order."""


def gains(comparisons: Sequence[Results], column: str = COLUMN) -> list[Gain]:
    """The gain of every structure over standard attention in every comparison, ascending in the context.

    Args:
        comparisons: of forecasts, one for each length of context, with the same structures.
        column: the error, a metric of the runs' last rows.

    Raises:
        ValueError: a comparison is not of forecasts, a length comes twice, or no run of standard attention is finished.
    """
    found = []
    for results in _ordered(comparisons):
        reference = {run.seed: run.final[column] for run in results.finished(REFERENCE)}
        if not reference:
            raise ValueError(f"comparisons must each have a finished run of {REFERENCE}, got none of {_name(results)}")
        for structure in (name for name in results.structures if name != REFERENCE):
            errors = {run.seed: run.final[column] for run in results.finished(structure)}
            percent = [100 * (1 - errors[seed] / reference[seed]) for seed in sorted(errors.keys() & reference.keys())]
            if percent:
                found.append(Gain(structure, results.sizes["context_length"], Estimate.of(percent)))
    return found


def draw_gains(comparisons: Sequence[Results], folder: Path, name: str = "gain") -> Figure:
    """Gain in the target's error against the length of the context, as `name.png` and `name.svg` in `folder`.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        ValueError: as `gains`.
        RunFolderError: a file cannot be written.
    """
    found = gains(comparisons)
    structures = list(dict.fromkeys(gain.structure for gain in found))
    lengths = sorted({gain.context_length for gain in found})
    with styled():
        figure = new_figure(5.6, 3.4)
        axes = figure.add_subplot()
        axes.axhline(0, color=QUIET, linewidth=1)
        for place, (structure, pen) in enumerate(pens(structures).items()):
            mine = [gain for gain in found if gain.structure == structure]
            aside = 1 + 0.02 * (place - (len(structures) - 1) / 2)  # so that error bars do not hide one another
            axes.errorbar(
                [aside * gain.context_length for gain in mine],
                [gain.percent.mean for gain in mine],
                yerr=[gain.percent.margin or 0.0 for gain in mine],
                fmt="o-",
                color=pen.colour,
                markersize=4,
                capsize=3,
                label=structure,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, list(map(str, lengths)))
        axes.minorticks_off()
        axes.set(xlabel="steps of context", ylabel=f"gain over {REFERENCE} in MAE of the target, %")
        axes.legend(frameon=False)
        files.make_folder(folder)
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}.{kind}", dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return figure


def gains_table(comparisons: Sequence[Results]) -> str:
    """The gains as a table in Markdown, with 95% intervals."""
    found = gains(comparisons)
    structures = list(dict.fromkeys(gain.structure for gain in found))
    cells = {(gain.context_length, gain.structure): _interval(gain.percent) for gain in found}
    rows = [
        [str(length), *(cells.get((length, name), "–") for name in structures)]
        for length in sorted({gain.context_length for gain in found})
    ]
    return markdown(["context", *(f"`{name}`" for name in structures)], rows)


def comparison_table(results: Results) -> str:
    """The table of one comparison in Markdown."""
    made = table(results)
    return markdown(made.headings, [row.cells for row in made.rows])


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _ordered(comparisons: Sequence[Results]) -> list[Results]:
    for results in comparisons:
        if results.task != "forecast":
            raise ValueError(f"comparisons must be of forecasts, got one of {results.task}")
    ordered = sorted(comparisons, key=lambda results: results.sizes["context_length"])
    lengths = [results.sizes["context_length"] for results in ordered]
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"comparisons must each have a context of their own, got contexts of {lengths}")
    return ordered


def _name(results: Results) -> str:
    return f"context {results.sizes['context_length']}"


def _interval(percent: Estimate) -> str:
    return f"{percent.mean:+.1f}%" + ("" if percent.margin is None else f" ± {percent.margin:.1f}")
