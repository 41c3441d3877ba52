import math

import pytest

from structattn.training.schedule import rate_factor


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_linear(schedule):
    factors = [rate_factor(progress, warmup=0.2, schedule=schedule) for progress in (0.0, 0.05, 0.1, 0.2)]
    assert factors == pytest.approx([0.0, 0.25, 0.5, 1.0])


def test_constant_stays():
    assert [rate_factor(progress, warmup=0.1, schedule="constant") for progress in (0.1, 0.5, 1.0)] == [1.0] * 3


def test_cosine_ends_at_its_final_rate():
    factors = [rate_factor(p, warmup=0.2, schedule="cosine", final=0.1) for p in (0.2, 0.4, 0.6, 1.0, 1.5)]
    assert factors == pytest.approx([1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1, 0.1])


def test_no_warm_up():
    assert rate_factor(0.0, warmup=0.0, schedule="cosine") == 1.0
