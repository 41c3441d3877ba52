"""Report a cache study as a figure, a table and a sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from structattn.comparison import files
from structattn.drawing.style import INK, QUIET, new_figure, save_figure, styled
from structattn.reporting.table import markdown_row
from structattn.reporting.terminal import terminal_table
from structattn.retrofit.cache_results import CacheResults, CacheRow

_KINDS = {
    "levels": ("levels", "#0072B2", "o"),
    "by layer": ("layer by layer", "#56B4E9", "o"),
    "window": ("window and sinks", "#D55E00", "^"),
    "uniform": ("uniform cut", "#009E73", "v"),
    "rounded": ("rounded", "#CC79A7", "D"),
}
_ROUNDED = {
    f"{kind}, rounded": (f"{label}, rounded", colour, "s")
    for kind, (label, colour, _) in _KINDS.items()
    if kind in ("levels", "by layer", "window")
}
"""Label, colour and marker of each kind of method."""

_TOO_FAR = 2.0
"""Perplexities above so many times standard attention's are left out of the figure."""


def _kind(row: CacheRow, results: CacheResults) -> str:
    """Return the kind of a row; for a rounded cache with that of the model that is rounded."""
    models = {each.name: each.kind for each in results.rows}
    name = row.name.rpartition(", int")[0]
    return f"{models[name]}, rounded" if row.kind == "rounded" and name in models else row.kind


def draw_cache(results: CacheResults, folder: Path, name: str = "retrofit") -> None:
    """Draw `name.png` and `.svg`: perplexity of the first text against the bytes of the cache.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        OSError: a file cannot be written.
    """
    standard = results.standard.untuned[0].perplexity
    with styled():
        figure = new_figure(6.4, 4.0)
        axes = figure.add_subplot()
        axes.axhline(standard, color=INK, linewidth=1.0, label="standard attention, 16 bits")
        axes.axhline(1.02 * standard, color=QUIET, linewidth=0.8, linestyle=":", label="2% above it")
        for kind, (label, colour, marker) in (_KINDS | _ROUNDED).items():
            rows = [row for row in results.rows[1:] if _kind(row, results) == kind]
            shown = [row for row in rows if row.best[0].perplexity <= _TOO_FAR * standard]
            if not shown:
                continue
            places = [100 * row.share for row in shown]
            axes.plot(places, [row.best[0].perplexity for row in shown], marker, color=colour, label=label)
            before = [
                row for row in shown if row.tuned and row.untuned and row.untuned[0].perplexity <= _TOO_FAR * standard
            ]
            for row in before:
                ends = [row.untuned[0].perplexity, row.best[0].perplexity]
                axes.plot([100 * row.share] * 2, ends, color=colour, linewidth=0.8, linestyle=":")
                axes.plot(100 * row.share, ends[0], marker, color=colour, fillstyle="none")
        axes.set(
            xlabel="cache of keys and values, % of standard attention's bytes",
            ylabel="perplexity per token",
            title=f"{results.model}, {results.length} tokens; hollow: before tuning",
        )
        axes.set_xlim(left=0)
        axes.legend(frameon=False, fontsize=7.5)
    files.make_folder(folder)
    save_figure(figure, folder, name)


def _columns(results: CacheResults) -> dict[str, Callable[[CacheRow], str]]:
    standard = results.standard.untuned

    def loss(row: CacheRow, text: int) -> str:
        change = row.best[text].perplexity / standard[text].perplexity - 1
        return f"{row.best[text].perplexity:.2f} ({change:+.1%})"

    columns: dict[str, Callable[[CacheRow], str]] = {
        "method": lambda row: row.name,
        "cache": lambda row: f"{row.share:.1%}",
        "untuned": lambda row: f"{row.untuned[0].perplexity:.2f}" if row.untuned else "",
    }
    for place, text in enumerate(standard):
        name = "perplexity" if not place else f"on {text.text}"
        columns[name] = functools.partial(loss, text=place)
    return columns | {
        "per word": lambda row: f"{row.best[0].word_perplexity:.1f}",
        "last quarter": lambda row: f"{row.best[0].parts[-1] - standard[0].parts[-1]:+.3f}",
    }


def cache_table(results: CacheResults) -> Table:
    """Return perplexities and cache shares of every method, for the terminal."""
    columns = _columns(results)
    cells = [[cell(row) for cell in columns.values()] for row in results.rows]
    caption = f"{results.length} tokens; last quarter: change of the loss there, nats per token"
    return terminal_table(list(columns), cells, left=1, caption=caption)


def cache_markdown(results: CacheResults) -> str:
    """Return the same table in Markdown."""
    columns = _columns(results)
    cells = [[cell(row) for cell in columns.values()] for row in results.rows]
    return "\n".join(map(markdown_row, [list(columns), ["---"] * len(columns), *cells]))


def cache_verdict(results: CacheResults, tolerance: float = 0.02) -> str:
    """Name the smallest cache whose perplexity is within a tolerance, whatever the method."""
    standard = results.standard.untuned[0].perplexity
    kept = [row for row in results.rows[1:] if row.best[0].perplexity <= (1 + tolerance) * standard]
    if not kept:
        return f"No method stays within {tolerance:.0%} of the perplexity {standard:.2f} of standard attention."
    best = min(kept, key=lambda row: row.share)
    return (
        f"The smallest cache within {tolerance:.0%} of standard attention's perplexity {standard:.2f} is that of "
        f"{best.name}: {best.share:.1%} of its bytes at {results.length} tokens, perplexity "
        f"{best.best[0].perplexity:.2f}."
    )


def layer_cells(layers: Mapping[str, Any]) -> list[list[str]]:
    """Return each hierarchy that layers have, and the numbers of these layers, from the contents of `layers.json`."""
    chosen: list[str] = layers["chosen"]
    return [
        [name, ", ".join(str(index) for index, each in enumerate(chosen) if each == name)]
        for name in layers["candidates"]
        if name in chosen
    ]


def layer_table(layers: Mapping[str, Any]) -> Table:
    """Return the same as a table for the terminal."""
    return terminal_table(["hierarchy", "layers"], layer_cells(layers), left=2)
