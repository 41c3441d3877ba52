"""Write a study's files, and one report over all studies."""

from __future__ import annotations

import csv
import io
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paper.catalogue import STUDIES
from paper.planning import duration
from paper.study import Finding, Outcome, Scale, Study
from paper.tables import write_csv
from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.numbers import grouped, magnitude
from structattn.drawing.style import save_figure
from structattn.reporting.report import inline, page_template


def conclude(study: Study, outcomes: Sequence[Outcome], scale: Scale, folder: Path, command: Sequence[str]) -> Finding:
    """Write the files of a study into its folder; return its finding.

    They are the figure (PNG and SVG), `results.csv` with one row per run, `curves.csv` with one row per evaluation,
    `finding.json`, `environment.json` and `README.md`.

    Raises:
        RunFolderError: a file cannot be written.
    """
    finding = study.finding(outcomes)
    save_figure(study.draw(outcomes), folder, study.name)
    write_csv(folder / "results.csv", [outcome.table_row() for outcome in outcomes])
    write_csv(folder / "curves.csv", [point for outcome in outcomes for point in outcome.curve_rows()])
    failed = [f"{each.name}: {each.error}" for each in outcomes if each.error]
    found = {
        "study": study.name,
        "scale": scale,
        "command": list(command),
        "finding": asdict(finding),
        "failed": failed,
    }
    files.write_json(folder / "finding.json", found)
    files.write_json(folder / "environment.json", environment(command))
    files.write_text(folder / "README.md", _page(study, finding, scale, command, outcomes))
    return finding


def collect(folder: Path) -> Path:
    """Write `report.html` over all studies below `folder`; return its path."""
    names = [name for name in STUDIES if (folder / name / "finding.json").exists()]
    template = page_template("studies.html", Path(__file__).parent / "templates")
    page = template.render(studies=[_section(folder / name, name) for name in names])
    files.write_text(folder / "report.html", page)
    return folder / "report.html"


def _section(folder: Path, name: str) -> dict[str, Any]:
    found = files.read_json(folder / "finding.json")
    heading, *rows = csv.reader(io.StringIO((folder / "results.csv").read_text(encoding="utf-8")))
    return {
        "study": STUDIES[name],
        "scale": found["scale"],
        "finding": Finding(**found["finding"]),
        "failed": found["failed"],
        "command": shlex.join(found["command"]),
        "columns": heading,
        "rows": [[_short(cell) for cell in row] for row in rows],
        "svg": inline((folder / f"{name}.svg").read_text(encoding="utf-8"), name),
    }


def _short(cell: str) -> str:
    try:
        return f"{float(cell):.4g}"
    except ValueError:
        return cell


def _page(study: Study, finding: Finding, scale: Scale, command: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    text = study.text
    failed = [f"- {each.name}: {each.error}" for each in outcomes if each.error]
    lines = [
        f"# {text.title}",
        "",
        f"{text.figure.capitalize()} of [arXiv 2509.07963](https://arxiv.org/abs/2509.07963), at scale `{scale}`.",
        text.question,
        "",
        f"**Found.** {finding.statement}",
        "",
        f"**{finding.agreement}** The paper: {text.reported}",
        "",
        f"![{text.title}]({study.name}.png)",
        "",
        *([table, ""] if (table := study.table(outcomes)) else []),
        "## How it was run",
        "",
        "```sh",
        shlex.join(command),
        "```",
        "",
        f"{study.scales[scale]} {_describe_runs(outcomes)}",
        "[results.csv](results.csv) has a row for each run, [curves.csv](curves.csv) a row for each evaluation, "
        "[environment.json](environment.json) the versions and the machine.",
    ]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return "\n".join([*lines, ""])


def _describe_runs(outcomes: Sequence[Outcome]) -> str:
    """Describe number, sizes and time of the runs."""
    ended = [outcome for outcome in outcomes if outcome.rows]
    if not ended:
        return "No run ended."
    kinds = Counter(str({**outcome.labels, "seed": None}) for outcome in ended)
    fewest, most = min(kinds.values()), max(kinds.values())
    seeds = str(most) if fewest == most else f"{fewest} to {most}"
    lasts = [outcome.rows[-1] for outcome in ended]
    return (
        f"{len(ended)} runs, {seeds} {'seed' if most == 1 else 'seeds'} of each kind. A run has "
        f"{_span([outcome.parameters for outcome in ended])} parameters, "
        f"{_span([row['step'] for row in lasts], grouped)} steps and "
        f"{_span([row['flops'] for row in lasts])} training FLOPs. The training times add up to "
        f"{duration(sum(row['seconds'] for row in lasts))}."
    )


def _span(values: Sequence[Any], text: Callable[[Any], str] = magnitude) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
