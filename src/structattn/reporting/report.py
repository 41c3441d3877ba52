"""Write `report.html`, a page for readers who ran nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structattn import checks
from structattn.comparison import files
from structattn.comparison.results import Results
from structattn.reporting.figures import Picture
from structattn.reporting.table import table
from structattn.reporting.verdict import verdict

TEMPLATES = Path(__file__).parent / "templates"
"""Folder of the templates and their style sheet."""

_EQUAL = {
    "flops": "Every model was given the same training compute; a cheaper structure takes more steps with it.",
    "steps": "Every model took the same number of steps on the same data; a cheaper structure spent less compute.",
    "tokens": "Every model was trained on the same number of tokens; a cheaper structure spent less compute.",
    "minutes": "Every model was given the same time on this machine; how many steps that makes depends on the code.",
}


def write_report(
    results: Results,
    pictures: Sequence[Picture],
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
    path: Path,
) -> None:
    """Write the report: one HTML file that loads nothing else.

    Args:
        results: results of the comparison.
        pictures: its figures.
        environment: content of `environment.json`.
        config: content of `config.json`.
        path: file to write.

    Raises:
        ImportError: without jinja2, naming the extra that brings it.
        RunFolderError: the file cannot be written.
    """
    jinja2 = checks.require("jinja2", "train")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html"
    )
    page = template.render(
        question=results.profile.question,
        setting=results.profile.setting,
        equal=_EQUAL[results.equal],
        results=results,
        verdict=verdict(results),
        table=table(results),
        pictures=[{"picture": picture, "svg": inline(picture.svg, picture.name)} for picture in pictures],
        seeds=len({run.seed for run in results.runs}),
        command=shlex.join(environment["command"]),
        environment=environment,
        settings=_flat(config),
        unmeasured=_unmeasured(results),
    )
    files.write_text(path, page)


def inline(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page.

    Its identifiers become unique on the page. The style's ink becomes the colour of the page's text, which is legible
    on a dark page.
    """
    from structattn.drawing.style import INK

    element = svg[svg.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        element = element.replace(mark, f"{mark}{name}-")
    return element.replace(INK, "currentColor")


def _unmeasured(results: Results) -> list[str]:
    """Return what the results do not show, for the last section of the report."""
    notes = [
        "Larger models, longer contexts and longer training: a ranking at this size and budget need not hold there.",
        "Other learning rates: all structures were trained with the same one.",
    ]
    if len({run.seed for run in results.runs}) < 3:
        notes.append("The spread between seeds, more than roughly: that takes three or more.")
    return [*notes, *results.profile.unmeasured]


def _flat(config: Any, name: str = "") -> list[tuple[str, str]]:
    """Return settings with nested names joined by dots; unset ones are left out."""
    if isinstance(config, Mapping):
        return [pair for key, value in config.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    if config is None or config == []:
        return []
    return [(name, " ".join(map(str, config)) if isinstance(config, list) else str(config))]
