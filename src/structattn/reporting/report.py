"""Write `report.html`, a page for readers who ran nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structattn import checks
from structattn.comparison import files
from structattn.comparison.results import Results
from structattn.reporting.figures import Picture, draw_all
from structattn.reporting.table import table
from structattn.reporting.verdict import verdict

_EQUAL = {
    "flops": "Every model was given the same training compute; a cheaper structure takes more steps with it.",
    "steps": "Every model took the same number of steps on the same data; a cheaper structure spent less compute.",
    "tokens": "Every model was trained on the same number of tokens; a cheaper structure spent less compute.",
    "minutes": "Every model was given the same time on this machine; how many steps that makes depends on the code.",
}


def write_report(results: Results, folder: Path) -> list[Picture]:
    """Write figures and a self-contained `report.html` into a comparison's folder.

    Returns:
        The figures of the report.

    Raises:
        ImportError: without matplotlib or jinja2, naming the extra that brings them.
        RunFolderError: a file cannot be read or written.
    """
    files.make_folder(folder / "figures")
    pictures = draw_all(results, folder / "figures")
    environment = files.read_json(folder / "environment.json")
    page = page_template("report.html").render(
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
        settings=_flat(files.read_json(folder / "config.json")),
        unmeasured=_unmeasured(results),
    )
    files.write_text(folder / "report.html", page)
    return pictures


def page_template(name: str, *folders: Path) -> Any:
    """Return the jinja2 template `name` from `folders`, or else from this package."""
    jinja2 = checks.require("jinja2", "train")
    loader = jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


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
    """Return the limits of the results, for the report's last section."""
    notes = [
        "Larger models, longer contexts and longer training: a ranking at this size and budget need not hold there.",
        "Other learning rates: all structures were trained with the same one.",
    ]
    if len({run.seed for run in results.runs}) < 3:
        notes.append("The spread between seeds, more than roughly: that takes three or more.")
    return [*notes, *results.profile.unmeasured]


def _flat(config: Any, name: str = "") -> list[tuple[str, str]]:
    """Return the settings that are set, nested names joined by dots."""
    if isinstance(config, Mapping):
        return [pair for key, value in config.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    if config is None or config == []:
        return []
    return [(name, " ".join(map(str, config)) if isinstance(config, list) else str(config))]
