"""The bounds on the page about GPUs are those that the committed code derives."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu import bounds

PAGE = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", bounds.tables())
def test_the_page_has_the_tables(name):
    assert "\n".join(bounds.tables()[name]) in PAGE


def test_the_exponential_is_as_dear_as_both_products_at_a_head_width_of_64():
    one = bounds.time_of(1, 64, "forward")
    assert one.products == pytest.approx(one.exponentials, rel=0.02)
    assert f"{1e12 * one.products:.2f} ps" in PAGE
    assert f"{bounds.EXPONENTIALS / 1e12:.1f} T/s" in PAGE


def test_levels_gain_nothing_where_products_hide_behind_the_exponential():
    whole, cut = bounds.time_of(1, 64, "forward"), bounds.time_of(1, 16, "forward")
    in_turn, at_once = bounds.gain(whole, cut)
    assert at_once == pytest.approx(1.0, rel=0.02)
    assert 1.5 < in_turn < 1.7
