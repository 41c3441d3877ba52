"""Results and their files, estimates, numbers as text. No training here."""

import json
import math
import os

import pytest

from structattn.comparison import files
from structattn.comparison.estimate import Estimate, t_quantile
from structattn.comparison.numbers import magnitude, number
from structattn.comparison.results import Results
from structattn.training import RunFolderError
from tests.comparison.fabricated import LIMITS, forecast_results, language_results, regression_results


def test_estimate():
    estimate = Estimate.of([1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert estimate.margin == pytest.approx(4.303 * estimate.standard_error)
    alone = Estimate.of([5.0])
    assert alone.standard_error is None
    assert alone.margin is None


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)])
def test_t_quantile(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=3e-3)


@pytest.mark.parametrize(
    "results",
    [language_results(failed=["mlr"]), regression_results(seeds=2), forecast_results()],
    ids=["text", "icl", "ett"],
)
def test_results_read_back(results, tmp_path):
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["summary"].keys() == set(results.structures)


def test_results_of_another_version_are_named(tmp_path):
    language_results().save(tmp_path)
    plain = json.loads((tmp_path / "results.json").read_text())
    del plain["stretches"]
    (tmp_path / "results.json").write_text(json.dumps(plain))
    with pytest.raises(RunFolderError, match=r"results\.json: written by another version \('stretches'\)"):
        Results.load(tmp_path)


def test_damaged_results_are_named(tmp_path):
    language_results().save(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"results\.json: damaged, not JSON"):
        Results.load(tmp_path)


def test_ranking_and_best_run():
    results = language_results(("standard", "mlr", "swa:64", "btt"))
    assert results.ranking == sorted(results.structures, key=LIMITS.__getitem__)
    assert results.best_run.structure == "mlr"
    assert results.complete
    failed = language_results(failed=["mlr"])
    assert failed.ranking == ["swa:64", "standard"]
    assert not failed.complete
    assert {run.structure for run in failed.failed} == {"mlr"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (999_999, "1.00M"), (829_696, "830k"), (2.05e13, "20.5T")],
)
def test_magnitude(value, text):
    assert magnitude(value) == text


def test_number():
    assert number(1.23456) == "1.235"
    assert number(0.00123) == "0.0012"


def test_file_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"a\.json: the file cannot be written: No space left on device"):
        files.write_json(path, {"x": 2})
    assert files.read_json(path) == {"x": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
