"""Verdict, table and maps of made-up results."""

import dataclasses

import numpy as np
import pytest

from structattn.reporting.maps import pair_widths
from structattn.reporting.table import table
from structattn.reporting.verdict import ONE_SEED, paired_difference, verdict
from tests.comparison.fabricated import SIZES, forecast_results, language_results, regression_results


def test_verdict_pairs_runs_by_seed():
    results = language_results()
    gap = paired_difference(results, "standard", "mlr")
    by_hand = [
        first.final["nats_per_character"] - second.final["nats_per_character"]
        for first, second in zip(results.finished("standard"), results.finished("mlr"), strict=True)
    ]
    assert gap.mean == pytest.approx(np.mean(by_hand))
    assert gap.count == 2
    conclusion = verdict(results)
    assert conclusion.answer.startswith("mlr has the lowest validation loss")
    assert "below standard" in conclusion.answer
    assert "60% of the score FLOPs" in conclusion.savings


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


def test_keys_and_values_in_the_cache_are_counted():
    results = language_results(("standard", "mlr"))
    assert "keeps 40% of the cache numbers when generating" in verdict(results).savings  # 271.5 + 136.5 of 1,024
    assert "cache /token" in table(results).headings
    assert next(row for row in table(results).rows if row.cells[0] == "mlr").cells[-1] == "408"


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
    assert "numbers" not in lost.savings
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


def test_maps():
    assert set(np.unique(pair_widths("standard", SIZES))) == {32}
    assert set(np.unique(pair_widths("standard:1", SIZES))) == {128}
    assert set(np.unique(pair_widths("mlr:16|8|8", SIZES))) == {16, 24, 32}
    window = pair_widths("swa:64", SIZES)
    assert window[100, 37] == 32
    assert window[100, 36] == 0
    assert set(np.unique(pair_widths("gswa:64|8", SIZES))) == {8, 32}
    near = pair_widths("mlr:16|16+windows=64|9", SIZES)
    assert set(np.unique(near)) == {0, 16, 32}  # pairs outside the first window share nothing
    assert np.array_equal(near > 0, window > 0)
    assert pair_widths("btt", SIZES) is None
