"""Report a retrofit study as a figure, a table and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from structattn.comparison import files
from structattn.comparison.numbers import grouped
from structattn.drawing.style import INK, QUIET, new_figure, save_figure, styled
from structattn.reporting.table import markdown_row
from structattn.reporting.terminal import terminal_table
from structattn.retrofit.measure import Measurement, RetrofitResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED, _TRAINED = "#0072B2", "#D55E00"


def draw_retrofit(studies: Sequence[RetrofitResults], folder: Path) -> None:
    """Draw `retrofit.png` and `.svg`: loss against key numbers, a panel per study.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        OSError: a file cannot be written.
    """
    with styled():
        figure = new_figure(4.4 * len(studies), 3.6)
        for place, results in enumerate(studies):
            _panel(figure.add_subplot(1, len(studies), place + 1), results)
    files.make_folder(folder)
    save_figure(figure, folder, "retrofit")


def _panel(axes: Axes, results: RetrofitResults) -> None:
    standard, tuned = results.standard, results.tune_steps > 0
    for order, colour in (("trained", _TRAINED), ("measured", _MEASURED)):
        rows = sorted((row for row in results.rows if row.order == order), key=lambda row: -row.key_numbers_per_token)
        shares = [100 * row.key_numbers_per_token / standard.key_numbers_per_token for row in rows]
        axes.plot(shares, [row.loss for row in rows], "o--", color=colour, markersize=3.5, label=f"{order} order")
        if tuned:
            label = f"{order} order, {results.tune_steps} steps of tuning"
            axes.plot(shares, [_loss(row, tuned) for row in rows], "o-", color=colour, markersize=3.5, label=label)
    best = _loss(standard, tuned)
    axes.axhline(best, color=INK, linewidth=1.0, label="standard attention" + (", tuned alike" if tuned else ""))
    axes.axhline(1.01 * best, color=QUIET, linewidth=0.8, linestyle=":", label="1% above it")
    axes.set(
        xlabel="key numbers in the cache, % of standard attention's",
        ylabel=f"validation loss, {results.unit}",
        title=f"{results.positions} positions, {results.context_length} tokens",
    )
    axes.set_xlim(100, 0)
    axes.legend(frameon=False, fontsize=7.5, handlelength=3.2)


_COLUMNS: dict[str, Callable[[Measurement, Measurement], str]] = {
    "ranks": lambda row, _: "|".join(map(str, row.ranks)),
    "order of dimensions": lambda row, _: row.order or "as it was",
    "loss": lambda row, _: f"{row.loss:.4f}",
    "tuned": lambda row, _: "" if row.tuned_loss is None else f"{row.tuned_loss:.4f}",
    "keys /token": lambda row, _: grouped(round(row.key_numbers_per_token)),
    "share of keys": lambda row, standard: f"{row.key_numbers_per_token / standard.key_numbers_per_token:.0%}",
    "score FLOPs": lambda row, standard: f"{row.score_flops_per_token / standard.score_flops_per_token:.0%}",
    "all FLOPs": lambda row, standard: f"{row.flops_per_token / standard.flops_per_token:.1%}",
}


def retrofit_table(results: RetrofitResults) -> Table:
    """Return the losses and costs of every model, for the terminal."""
    caption = f"losses in {results.unit}, costs at {results.context_length} tokens"
    return terminal_table(list(_COLUMNS), _cells(results), left=2, caption=caption)


def retrofit_markdown(results: RetrofitResults) -> str:
    """Return the same table in Markdown."""
    headings = [f"loss, {results.unit}" if name == "loss" else name for name in _COLUMNS]
    return "\n".join(map(markdown_row, [headings, ["---"] * len(headings), *_cells(results)]))


def _cells(results: RetrofitResults) -> list[list[str]]:
    return [[cell(row, results.standard) for cell in _COLUMNS.values()] for row in results.rows]


def retrofit_verdict(results: RetrofitResults, tolerance: float = 0.01) -> str:
    """Say how far the key cache shrinks within a loss tolerance."""
    standard, tuned = results.standard, results.tune_steps > 0
    before = _loss(standard, tuned)
    kept = [row for row in results.rows[1:] if _loss(row, tuned) <= (1 + tolerance) * before]
    how = f"after {results.tune_steps} steps of tuning" if tuned else "without tuning"
    if not kept:
        return f"No split of the ranks tried stays within {tolerance:.0%} of the loss of standard attention {how}."
    best = min(kept, key=lambda row: row.key_numbers_per_token)
    share = best.key_numbers_per_token / standard.key_numbers_per_token
    return (
        f"{best.name} keeps {share:.0%} of the key numbers at {results.context_length} tokens, and its loss {how} is "
        f"{_loss(best, tuned):.4f} against {before:.4f}, {round(_loss(best, tuned) / before - 1, 3) + 0.0:+.1%}."
    )


def _loss(row: Measurement, tuned: bool) -> float:
    return row.tuned_loss if tuned and row.tuned_loss is not None else row.loss
