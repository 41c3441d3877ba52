"""A comparison's table and verdict in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from structattn.studies.results import Results
from structattn.studies.table import table
from structattn.studies.verdict import verdict

_STYLES = {"best": "bold", "structure": "", "failed": "red", "baseline": "dim"}


def print_results(results: Results, console: Console) -> None:
    """Print the table, the answer, how far to trust it, and what is saved."""
    cells = table(results)
    title = f"{results.task}, {results.budget} per model"
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, heading in enumerate(cells.headings):
        narrow = max(len(cell) for cell in [*heading.split(), *(row.cells[place] for row in cells.rows)])
        shown.add_column(heading, justify="right" if place else "left", min_width=narrow, max_width=max(narrow, 8))
    for row in cells.rows:
        shown.add_row(*row.cells, style=_STYLES[row.kind])
    console.print()
    console.print(shown, width=max(console.width, 100), crop=False)  # nothing is cut off in a narrow terminal
    said = verdict(results)
    for sentence in (said.answer, said.trust, said.savings):
        if sentence:
            console.print(sentence, highlight=False, markup=False)
