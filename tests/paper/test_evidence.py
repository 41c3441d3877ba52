"""Differences of means over seeds."""

import math

import pytest

from paper.evidence import paired_difference, pooled_margin
from paper.study import Outcome
from structattn.comparison.estimate import Estimate


def test_pooled_margin():
    """For two groups it is the interval of Student's t test with equal deviations."""
    first, second = [1.0, 2.0, 4.0], [2.0, 5.0]
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    result = stats.ttest_ind(first, second)
    interval = result.confidence_interval(0.95)
    groups = [Estimate.of(first), Estimate.of(second)]
    assert pooled_margin(groups, *groups) == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    alone = Estimate.of([1.0])
    assert pooled_margin([alone, alone], alone, alone) == math.inf


def test_paired_difference_is_over_the_seeds_that_both_have():
    def runs(*losses):
        return [
            Outcome({"seed": seed}, 1, ({"last_error": loss},) if loss is not None else ())
            for seed, loss in enumerate(losses)
        ]

    difference = paired_difference(runs(1.0, 2.0, 4.0), runs(0.5, 1.0, None))
    assert (difference.mean, difference.count) == (0.75, 2)
    assert difference.standard_error == pytest.approx(0.25)
    assert paired_difference(runs(None, 1.0), runs(1.0, None)) is None
