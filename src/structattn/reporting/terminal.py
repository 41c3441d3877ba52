"""Print tables and verdicts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from structattn.comparison.results import Results
from structattn.reporting.table import table
from structattn.reporting.verdict import verdict

_STYLES = {"best": "bold", "structure": "", "failed": "red", "baseline": "dim"}


def terminal_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    styles: Sequence[str] | None = None,
    **options: Any,
) -> Table:
    """Return a table whose headings may wrap and whose cells never do.

    Args:
        headings: headings of the columns.
        rows: cells of each row.
        left: number of text columns, aligned left; number columns are aligned right.
        styles: styles of the rows.
        options: passed to `rich.table.Table`.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, **options)
    for place, heading in enumerate(headings):
        narrow = max(len(cell) for cell in [*heading.split(), *(row[place] for row in rows)])
        made.add_column(
            heading, justify="left" if place < left else "right", min_width=narrow, max_width=max(narrow, 8)
        )
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        made.add_row(*row, style=style)
    return made


def print_table(made: Table, console: Console) -> None:
    """Print a table at full width; narrow terminals wrap its lines."""
    needed = Measurement.get(console, console.options.update(max_width=10_000), made).minimum
    console.print(made, width=max(console.width, needed), crop=False, soft_wrap=False)


def print_results(results: Results, console: Console) -> None:
    """Print the table and the verdict."""
    cells = table(results)
    console.print()
    print_table(
        terminal_table(
            cells.headings,
            [row.cells for row in cells.rows],
            styles=[_STYLES[row.kind] for row in cells.rows],
            title=f"{results.task}, {results.budget} per model",
            title_justify="left",
        ),
        console,
    )
    conclusion = verdict(results)
    for sentence in (conclusion.answer, conclusion.trust, conclusion.savings):
        if sentence:
            console.print(sentence, highlight=False, markup=False)
