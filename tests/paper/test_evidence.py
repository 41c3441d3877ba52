"""Differences of means over seeds."""

import math

import pytest

from paper.evidence import pooled_margin
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
