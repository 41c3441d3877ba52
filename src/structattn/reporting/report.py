"""`report.html`: one file that explains a comparison to someone who did not run it."""

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
"""Folder of the pages and of their common style sheet."""

_QUESTIONS = {
    "language": "Which attention structure predicts this text best at the same budget, and what does it save?",
    "regression": "Which attention structures can compare inputs of so many dimensions, and at which cost?",
    "forecast": "Which attention structure forecasts this series best, and does it beat forecasts without it?",
}
_TASKS = {
    "language": (
        "Each model reads windows of text and predicts every next character. The validation loss is measured on text "
        "that no model was trained on, the same for all: nats per character, lower is better; bits are nats / ln 2."
    ),
    "regression": (
        "Each prompt shows pairs x, y = wᵀx with a hidden w of its own; the model predicts every y from the pairs "
        "before it. The error is squared and divided by the number of dimensions, so that always answering 0 "
        "costs 1. Least squares is exact once it has seen as many pairs as there are dimensions."
    ),
    "forecast": (
        "Each model reads the last values of every channel, all steps attending to one another, and predicts the next "
        "values of every channel. Values are standardised by the training part. Validation windows are followed "
        "through training; the table is of the end of training, on every window of the test part, which no choice was "
        "made by. The linear forecast is ridge regression on the same context, in closed form."
    ),
}
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
    """Write the report of `results`: one HTML file with its styles and figures inside, which loads nothing.

    Args:
        results: what the comparison found.
        pictures: its figures.
        environment: what `environment.json` holds.
        config: what `config.json` holds.
        path: the file.

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
        question=_QUESTIONS[results.task],
        task=_TASKS[results.task],
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
    """An SVG file as an element of a page: without its prologue, with names that no other figure of the page has.

    What is drawn in the style's ink takes the colour of the page's text, so that it is legible on a dark page.
    """
    from structattn.drawing.style import INK

    element = svg[svg.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        element = element.replace(mark, f"{mark}{name}-")
    return element.replace(INK, "currentColor")


def _unmeasured(results: Results) -> list[str]:
    """What a reader might take from the results and should not."""
    notes = [
        "Larger models, longer contexts and longer training: a ranking at this size and budget need not hold there.",
        "Other learning rates: all structures were trained with the same one.",
    ]
    if len({run.seed for run in results.runs}) < 3:
        notes.append("The spread between seeds, more than roughly: that takes three or more.")
    if results.task == "forecast":
        notes.append("Other series, horizons and splits: this is one stretch of one series.")
    if results.task == "language":
        notes.append("Memory and speed of generation: key numbers are counted, not timed.")
    return notes


def _flat(config: Any, name: str = "") -> list[tuple[str, str]]:
    """Settings one by one, nested names joined by dots, what is unset left out."""
    if isinstance(config, Mapping):
        return [pair for key, value in config.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    if config is None or config == []:
        return []
    return [(name, " ".join(map(str, config)) if isinstance(config, list) else str(config))]
