"""The table of a comparison, as text: the terminal and the report show the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structattn.comparison.estimate import Estimate
from structattn.comparison.numbers import format_estimate, grouped, magnitude, number
from structattn.comparison.results import Results

MISSING = "–"


@dataclass(frozen=True)
class TableRow:
    """One structure, or one predictor that is no model."""

    cells: tuple[str, ...]
    """Text under each heading."""

    kind: str
    """`best`, `structure`, `failed` or `baseline`."""


@dataclass(frozen=True)
class Table:
    """Headings and rows, the best structure first, failed ones and baselines last."""

    headings: tuple[str, ...]
    rows: tuple[TableRow, ...]


# Columns of metrics in the rows of each task, with their headings.
_METRICS = {
    "language": {"nats_per_character": "nats/char", "bits_per_character": "bits/char"},
    "regression": {"last_error": "last error", "mean_error": "mean error"},
    "forecast": {
        "test_mse": "MSE",
        "test_mae": "MAE",
        "test_target_mae": "target MAE",
        "test_target_mae_unit": "in its unit",
    },
}


def table(results: Results, *, wide: bool = False) -> Table:
    """The table of `results`; with `wide`, a forecast's target has its standard error too."""
    metrics = _METRICS[results.task]
    spread = (next(iter(metrics)), *(["test_target_mae"] if wide else []))
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
    """The same, in Markdown."""
    made = table(results, wide=True)
    lines = [made.headings, ("---",) * len(made.headings), *(row.cells for row in made.rows)]
    return "".join(f"{markdown_row(line)}\n" for line in lines)


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown: bars, which end a cell, become the commas that spellings of ranks allow as well."""
    return f"| {' | '.join(cell.replace('|', ',') for cell in cells)} |"


def _cost_headings(results: Results) -> tuple[str, ...]:
    return ("score FLOPs /token", "keys /token") if results.is_causal else ("score FLOPs /token",)


def _cost_cells(results: Results, structure: str) -> tuple[str, ...]:
    cost = results.costs[structure]
    cells = (magnitude(cost.score_flops_per_token), grouped(cost.key_numbers_per_token))
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
    """Metrics by their means, those in `spread` with their standard errors."""
    cells = []
    for column in metrics:
        estimate = results.estimate(structure, column)
        cells.append(MISSING if estimate is None else (format_estimate if column in spread else _mean)(estimate))
    return cells


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


def _mean(estimate: Estimate) -> str:
    return number(estimate.mean)
