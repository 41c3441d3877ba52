"""What is made of results: estimates, verdicts, the table, files. No training here."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from structattn.studies import files
from structattn.studies.estimate import Estimate, pooled_margin, t_quantile
from structattn.studies.maps import pair_widths
from structattn.studies.results import Results
from structattn.studies.table import magnitude, table
from structattn.studies.verdict import ONE_SEED, number, paired_difference, verdict
from structattn.training import RunFolderError
from studies.fabricated import LIMITS, SIZES, forecast_results, language_results, regression_results


def test_estimate():
    estimate = Estimate.of([1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert estimate.margin == pytest.approx(4.303 * estimate.standard_error)
    alone = Estimate.of([5.0])
    assert alone.standard_error is None
    assert alone.margin is None


def test_pooled_margin():
    """Of two groups it is the interval of Student's t test with equal deviations."""
    first, second = [1.0, 2.0, 4.0], [2.0, 5.0]
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    result = stats.ttest_ind(first, second)
    interval = result.confidence_interval(0.95)
    groups = [Estimate.of(first), Estimate.of(second)]
    assert pooled_margin(groups, *groups) == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    alone = Estimate.of([1.0])
    assert pooled_margin([alone, alone], alone, alone) == math.inf


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


def test_verdict_pairs_runs_by_seed():
    results = language_results()
    gap = paired_difference(results, "standard", "mlr")
    by_hand = [
        first.final["nats_per_character"] - second.final["nats_per_character"]
        for first, second in zip(results.finished("standard"), results.finished("mlr"), strict=True)
    ]
    assert gap.mean == pytest.approx(np.mean(by_hand))
    assert gap.count == 2
    said = verdict(results)
    assert said.answer.startswith("mlr has the lowest validation loss")
    assert "below standard" in said.answer
    assert "60% of the score FLOPs" in said.savings


def test_verdict_does_not_claim_what_one_seed_cannot_show():
    assert verdict(language_results(seeds=1)).trust == ONE_SEED
    same = language_results(("standard", "mlr"))
    blurred = [
        row | {"nats_per_character": 1.5 + 0.1 * (run.seed if run.structure == "mlr" else 1 - run.seed)}
        for run in same.runs
        for row in run.rows[-1:]
    ]
    runs = tuple(dataclasses.replace(run, rows=(row,)) for run, row in zip(same.runs, blurred, strict=True))
    assert "does not stand out" in verdict(dataclasses.replace(same, runs=runs)).trust


def test_verdict_without_results():
    nothing = language_results(("mlr",), failed=["mlr"])
    assert verdict(nothing).answer == "No run finished, so there is nothing to compare."
    assert verdict(language_results(("mlr",))).answer.startswith("Only mlr has a result")


def test_a_baseline_that_wins_is_said_first():
    lost = verdict(forecast_results(linear=0.38))
    assert lost.answer.startswith(
        "Attention loses: linear (0.380) has a lower test error than every attention structure. Among those, "
        "mlr+levels=4 has the lowest test error: 0.427 ± 0.0012 MSE of standardised values, "
        "0.015 (3.4%) below standard."
    )
    assert "key numbers" not in lost.savings
    won = verdict(forecast_results(linear=0.5))
    assert won.answer.startswith("mlr+levels=4 has the lowest test error")
    assert verdict(regression_results()).answer.startswith("btt has the lowest")


def test_forecasts_are_ranked_by_the_test_part_and_followed_on_the_validation_part():
    results = forecast_results()
    assert (results.metric, results.followed) == ("test_mse", "mse")
    assert results.ranking == ["mlr+levels=4", "mlr+levels=2", "standard"]
    made = table(results)
    assert made.headings[4:] == ("MSE", "MAE", "target MAE", "in its unit", "tokens/s", "score FLOPs /token")
    rows = {row.cells[0]: row for row in made.rows}
    assert rows["mlr+levels=4"].cells[4:6] == ("0.427 ± 0.0012", "0.653")
    assert rows["linear"].cells == ("linear", "–", "–", "–", "0.380", "0.616", "0.152", "1.368", "–", "–")
    assert {len(row.cells) for row in made.rows} == {len(made.headings)}


def test_table_rows():
    rows = {row.cells[0]: row for row in table(language_results(failed=["swa:64"])).rows}
    assert rows["mlr"].kind == "best"
    assert rows["swa:64 (failed)"].kind == "failed"
    assert "±" in rows["standard"].cells[4]
    baselines = [row.cells[0] for row in table(regression_results()).rows if row.kind == "baseline"]
    assert baselines == ["least squares", "ridge", "zero"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (999_999, "1.00M"), (829_696, "830k"), (2.05e13, "20.5T")],
)
def test_magnitude(value, text):
    assert magnitude(value) == text


def test_number():
    assert number(1.23456) == "1.235"
    assert number(0.00123) == "0.0012"


def test_maps():
    assert set(np.unique(pair_widths("standard", SIZES))) == {32}
    assert set(np.unique(pair_widths("standard:1", SIZES))) == {128}
    assert set(np.unique(pair_widths("mlr:16|8|8", SIZES))) == {16, 24, 32}
    window = pair_widths("swa:64", SIZES)
    assert window[100, 37] == 32
    assert window[100, 36] == 0
    assert set(np.unique(pair_widths("gswa:64|8", SIZES))) == {8, 32}
    assert pair_widths("btt", SIZES) is None


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
