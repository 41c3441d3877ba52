"""Write the JSON and Markdown of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from structattn.atomic import replacing

Row = dict[str, Any]
"""A variant of a case in the JSON."""


def write_json(document: Mapping[str, Any], path: Path | None) -> None:
    """Write the document to `path` in one step, or else print it."""
    text = json.dumps(document, indent=1) + "\n"
    if path is None:
        print(text, end="")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_row(header), "|---" * len(header) + "|", *map(_row, rows)]


def table_by_length(rows: list[Row], text: Callable[[Row, Row], str], baseline: str) -> list[str]:
    """Return a table by length (rows) and variant (columns).

    Args:
        rows: the measured rows.
        text: returns a cell, given the variant's row and the baseline's at the same length.
        baseline: name of the baseline's variant.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    body = []
    for length in sorted({row["length"] for row in rows}):
        found = {row["variant"]: row for row in rows if row["length"] == length}
        cells = [text(found[each], found.get(baseline, {})) if each in found else "" for each in variants]
        body.append([str(length), *cells])
    return table(["T", *variants], body)


def describe_machine(facts: Mapping[str, Any], load_after: float | None = None) -> str:
    """Return `machine.facts` in words: processor, threads, versions and load average."""
    load = f"{facts['load_average_before'][0]:.1f} before"
    if load_after is not None:
        load += f" and {load_after:.1f} after (2.0 is two busy cores)"
    held = facts.get("held_to", "native")
    limit = "" if held == "native" else f" (held to {held})"
    return (
        f"{facts['cpu']}, {facts['threads']} threads pinned to {facts['pinning']}, "
        f"{', '.join(facts['instructions'])}{limit}; torch {facts['torch']}, commit {facts['commit'][:12]}, "
        f"{facts['time']}. Load average {load}."
    )


def _row(cells: Sequence[str]) -> str:
    # A bar would end the cell. Ranks may be separated by commas, too.
    return f"| {' | '.join(cell.replace('|', ',') for cell in cells)} |"
