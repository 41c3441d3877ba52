"""Figures, report and terminal output of made-up results."""

import html.parser
import io
import re
import xml.etree.ElementTree

import pytest
from rich.console import Console

from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.reporting.figures import draw_all
from structattn.reporting.report import write_report
from structattn.reporting.terminal import print_results
from tests.comparison.fabricated import forecast_results, language_results, regression_results

CASES = {
    "language": language_results(failed=["swa:64"]),
    "one seed": language_results(seeds=1),
    "regression": regression_results(),
    "forecast": forecast_results(),
    "forecast, one seed": forecast_results(seeds=1),
    "all failed": language_results(("standard", "mlr"), failed=["standard", "mlr"]),
}


class _Page(html.parser.HTMLParser):
    """Parse a page: elements that stay open, and addresses that it would load."""

    void = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.loads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loads += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    results = CASES[request.param]
    folder = tmp_path_factory.mktemp("report")
    files.write_json(
        folder / "config.json", {"attentions": [*results.structures], "train": {"steps": 5, "tokens": None}}
    )
    files.write_json(folder / "environment.json", environment(["structattn", "compare", "it's"]))
    return results, write_report(results, folder), folder


def test_page_is_whole_and_loads_nothing(written):
    results, pictures, folder = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    parsed = _Page(page)
    assert parsed.open == []
    assert parsed.loads == []
    assert page.count("<svg") == len(pictures)
    for name in results.structures:
        assert name in page
    for run in results.failed:
        assert run.error in page
    assert "structattn compare" in page
    assert "train.tokens" not in page


def test_names_inside_figures_do_not_clash(written):
    _, _, folder = written
    names = re.findall(r' id="([^"]+)"', (folder / "report.html").read_text(encoding="utf-8"))
    assert len(names) == len(set(names))


def test_figures_are_files_too(written):
    _, pictures, folder = written
    assert pictures
    for picture in pictures:
        assert (folder / "figures" / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
        xml.etree.ElementTree.parse(folder / "figures" / f"{picture.name}.svg")


def test_forecasts_are_drawn(written):
    results, pictures, folder = written
    names = {picture.name for picture in pictures}
    assert ({"forecasts", "target-error"} <= names) == (results.task == "forecast")
    if results.task == "forecast":
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert all(example["begins"] in page for example in results.examples)
        assert "key cache" not in page
        assert page.index("Attention loses: linear (0.380)") < page.index("mlr+levels=4 has the lowest test error")


def test_equal_results_give_equal_figures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw_all(language_results(), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_terminal_fits(name):
    console = Console(width=100, record=True, file=io.StringIO())
    print_results(CASES[name], console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 100
    for structure in CASES[name].structures:
        assert structure in printed
