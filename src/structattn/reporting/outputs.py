"""Write figures and report of a comparison beside its results."""

from __future__ import annotations

from pathlib import Path

from structattn.comparison import files
from structattn.comparison.results import Results
from structattn.reporting.figures import draw_all
from structattn.reporting.report import write_report


def write_outputs(results: Results, folder: Path) -> None:
    """Write figures and `report.html` of `results` into `folder`.

    Raises:
        ImportError: without matplotlib or jinja2, naming the extra that brings them.
        RunFolderError: a file cannot be read or written.
    """
    files.make_folder(folder / "figures")
    pictures = draw_all(results, folder / "figures")
    config, machine = files.read_json(folder / "config.json"), files.read_json(folder / "environment.json")
    write_report(results, pictures, machine, config, folder / "report.html")
