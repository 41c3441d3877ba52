"""Published pages of benchmarks are what their generators write from the published JSON."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import (
    cpu_page,
    forecast_tables,
    generation,
    report,
    retrofit,
    retrofit_cache,
    standard_kernel,
    training_step,
)

from structattn.comparison import files
from structattn.ops.standard import _FASTER_FROM
from structattn.retrofit.measure import RetrofitResults

RESULTS = Path(__file__).parents[1] / "docs" / "results"

PAGES = {
    "gpu-compiled": lambda document, path: report.compiled_markdown(document),
    "generation-cpu": lambda document, path: generation.page(document),
    "training-step-cpu": lambda document, path: training_step.page(document["seconds"], document["machine"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_written_from_its_json(name):
    path = RESULTS / f"{name}.json"
    assert PAGES[name](json.loads(path.read_text()), path) == path.with_suffix(".md").read_text()


def test_the_page_on_attention_is_written_from_all_its_json():
    assert cpu_page.page(RESULTS) == (RESULTS / "attention-cpu.md").read_text()


@pytest.mark.parametrize("path", sorted((RESULTS / "retrofit").glob("smollm2*.json")), ids=lambda path: path.stem)
def test_the_page_on_a_smaller_cache_is_written_from_its_json(path):
    assert retrofit_cache.page(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


KERNELS = sorted(RESULTS.glob(f"{standard_kernel.PAGE}*.json"))


def test_the_page_on_the_kernel_of_standard_attention_is_written_from_all_its_json():
    assert KERNELS
    assert standard_kernel.page(RESULTS) == (RESULTS / f"{standard_kernel.PAGE}.md").read_text()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_standard_attention_takes_the_compiled_kernel_only_where_it_was_faster(path):
    for row in json.loads(path.read_text())["rows"]:
        dtype = standard_kernel.DTYPES[row["dtype"]]
        shortest = _FASTER_FROM.get((dtype, row["training"], row["is_causal"]), math.inf)
        assert row["chosen"] == ("compiled" if row["length"] >= shortest else "torch")
        assert row["chosen"] == "torch" or standard_kernel.ratio(row) >= 1.0, row


def _commands(page):
    """Return the words of the commands on a page."""
    return [shlex.split(command) for command in re.findall(r"```sh\n(.*?)\n```", page, flags=re.DOTALL)]


def _option(words, name, default=""):
    return words[words.index(name) + 1] if name in words else default


def _finished(folder, words, results, config):
    """Make the folder that a command leaves, as far as the generators read it."""
    files.make_folder(folder)
    shutil.copyfile(results, folder / "results.json")
    files.write_json(folder / "environment.json", {"command": words})
    files.write_json(folder / "config.json", config)


def test_the_page_on_retrofitting_is_written_from_its_json(tmp_path):
    page = (RESULTS / "retrofit" / "README.md").read_text()
    folders = []
    for words in _commands(page):
        folders.append(tmp_path / Path(_option(words, "--out")).name)
        results = RESULTS / "retrofit" / f"{folders[-1].name}.json"
        _finished(folders[-1], words, results, {"pairs": _option(words, "--pairs", "far")})
    assert retrofit.page(folders, [RetrofitResults.load(folder) for folder in folders]) == page


def test_sections_on_forecasting_are_written_from_their_json(tmp_path):
    page = (RESULTS / "forecasting" / "README.md").read_text()
    for words in _commands(page):
        task = {"context_length": int(_option(words, "--context")), "horizon": int(_option(words, "--horizon"))}
        name = "{context_length}-{horizon}".format(**task)
        results = RESULTS / "forecasting" / f"results-{name}.json"
        _finished(tmp_path / name, words, results, {"task": task})
        finals = [
            {"structure": run["structure"], "seed": run["seed"], **run["final"]}
            for run in json.loads(results.read_text())["runs"]
        ]
        lines = "".join(json.dumps(final) + "\n" for final in finals)
        files.write_text(tmp_path / name / "metrics.jsonl", lines)
        assert forecast_tables._section(tmp_path / name) in page
