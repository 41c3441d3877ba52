"""Comparisons at several lengths of context, side by side."""

import dataclasses

import pytest

from structattn.studies.forecast_gain import comparison_table, draw_gains, gains, gains_table
from studies.fabricated import forecast_results, language_results


def at(length, seeds=3):
    results = forecast_results(seeds=seeds)
    return dataclasses.replace(results, sizes={**results.sizes, "context_length": length})


def test_gains_are_paired_by_seed():
    found = gains([at(192), at(96)])
    assert [(gain.structure, gain.context_length) for gain in found] == [
        ("mlr+levels=2", 96), ("mlr+levels=4", 96), ("mlr+levels=2", 192), ("mlr+levels=4", 192)
    ]  # fmt: skip
    expected = [100 * (1 - (0.43 + 0.002 * seed) / (0.44 + 0.002 * seed)) for seed in range(3)]
    assert found[0].percent.mean == pytest.approx(sum(expected) / 3)
    assert found[0].percent.count == 3
    assert found[0].percent.margin > 0


def test_figure_and_tables(tmp_path):
    comparisons = [at(96), at(192, seeds=1)]
    draw_gains(comparisons, tmp_path / "out")
    assert (tmp_path / "out" / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "gain.svg").read_text()
    lines = gains_table(comparisons).splitlines()
    assert lines[0] == "| context | `mlr+levels=2` | `mlr+levels=4` |"
    assert lines[2].startswith("| 96 | +2.3% ± 0.0 |")
    assert lines[3] == "| 192 | +2.3% | +3.4% |"
    assert "| linear | – |" in comparison_table(comparisons[0])


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ([language_results()], "comparisons must be of forecasts, got one of language"),
        ([at(96), at(96)], r"comparisons must each have a context of their own, got contexts of \[96, 96\]"),
        ([], "comparisons must each have a context"),
        (
            [dataclasses.replace(at(96), runs=at(96).runs[3:])],
            "comparisons must each have a finished run of standard, got none of context 96",
        ),
    ],
)
def test_bad_comparisons(comparisons, message):
    with pytest.raises(ValueError, match=message):
        gains(comparisons)
