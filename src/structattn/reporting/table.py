"""Build the table of a comparison for terminal and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structattn.comparison.numbers import format_estimate, grouped, magnitude, number
from structattn.comparison.results import Results

MISSING = "–"


@dataclass(frozen=True)
class TableRow:
    """Row of a structure or a baseline."""

    cells: tuple[str, ...]
    """Text under each heading."""

    kind: str
    """`best`, `structure`, `failed` or `baseline`."""


@dataclass(frozen=True)
class Table:
    """Headings and rows, best structure first, failed ones and baselines last."""

    headings: tuple[str, ...]
    rows: tuple[TableRow, ...]


def table(results: Results, *, wide: bool = False) -> Table:
    """Return the table of `results`; `wide` shows more standard errors."""
    metrics = results.columns
    spread = (next(iter(metrics)), *(results.profile.wide_columns if wide else ()))
    headings = (
        "structure",
        "params",
        "steps",
        "FLOPs",
        *metrics.values(),
        "tokens/s",
        *_cost_headings(results),
    )
    ranking = results.ranking
    rows = [_structure_row(results, name, tuple(metrics), spread, best=name == ranking[0]) for name in ranking]
    rows += [_failed_row(results, name, tuple(metrics)) for name in results.structures if name not in ranking]
    rows += [_baseline_row(results, name, tuple(metrics)) for name in results.baselines]
    return Table(headings, tuple(rows))


def markdown(results: Results) -> str:
    """Return the wide table in Markdown."""
    made = table(results, wide=True)
    lines = [made.headings, ("---",) * len(made.headings), *(row.cells for row in made.rows)]
    return "".join(f"{markdown_row(line)}\n" for line in lines)


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row in Markdown; bars, which end a cell, become commas."""
    return f"| {' | '.join(cell.replace('|', ',') for cell in cells)} |"


def _cost_headings(results: Results) -> tuple[str, ...]:
    cached = "cache /token" if results.counts_values else "keys /token"
    return ("score FLOPs /token", cached) if results.is_causal else ("score FLOPs /token",)


def _cost_cells(results: Results, structure: str) -> tuple[str, ...]:
    cells = (magnitude(results.costs[structure].score_flops_per_token), grouped(results.cached_per_token(structure)))
    return cells[: len(_cost_headings(results))]


def _structure_row(
    results: Results, structure: str, metrics: tuple[str, ...], spread: tuple[str, ...], *, best: bool
) -> TableRow:
    runs = results.finished(structure)
    cost = results.costs[structure]
    cells = (
        structure,
        magnitude(cost.parameters),
        grouped(sum(run.final["step"] for run in runs) / len(runs)),
        magnitude(sum(run.final["flops"] for run in runs) / len(runs)),
        *_metric_cells(results, structure, metrics, spread),
        grouped(results.tokens_per_second(structure)),
        *_cost_cells(results, structure),
    )
    return TableRow(cells, "best" if best else "structure")


def _metric_cells(results: Results, structure: str, metrics: tuple[str, ...], spread: tuple[str, ...]) -> list[str]:
    """Return the means of metrics, those in `spread` with their standard errors."""
    estimates = {column: results.estimate(structure, column) for column in metrics}
    return [format_estimate(each) if column in spread else number(each.mean) for column, each in estimates.items()]


def _failed_row(results: Results, structure: str, metrics: tuple[str, ...]) -> TableRow:
    cost = results.costs[structure]
    cells = (
        f"{structure} (failed)",
        magnitude(cost.parameters),
        *[MISSING] * (len(metrics) + 3),
        *_cost_cells(results, structure),
    )
    return TableRow(cells, "failed")


def _baseline_row(results: Results, name: str, metrics: tuple[str, ...]) -> TableRow:
    numbers = [number(results.baselines[name][column]) for column in metrics]
    cells = (name, *[MISSING] * 3, *numbers, MISSING, *[MISSING] * len(_cost_headings(results)))
    return TableRow(cells, "baseline")
