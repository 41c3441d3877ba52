"""The coordinate check passes where muP's rules hold, and fails for each rule that is broken on purpose."""

import matplotlib
import pytest

from structattn.models import parameters
from structattn.models.parameters import ParameterRole
from structattn.training import mup
from structattn.training.coordinates import CoordinateCheck, check_coordinates

matplotlib.use("Agg")

WIDTHS = (64, 128, 256)


def check(structure="standard", **options):
    return check_coordinates(structure, widths=WIDTHS, **options)


@pytest.mark.parametrize("structure", ["standard", "mlr", "btt", "bmlr", "swa:16"])
def test_mup_passes(structure):
    result = check(structure)
    assert result.passed, result.verdict
    assert max(map(abs, result.slopes.values())) <= 0.25


def test_one_rate_for_all_fails():
    result = check(mup=False)
    assert not result.passed
    assert {"size of head", "size of contract 1", "change of q_proj 1", "change of v_proj 2"} <= set(result.failures)
    assert "standard parametrisation: fail" in result.verdict


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        (ParameterRole.HIDDEN, "change of k_proj 2"),
        (ParameterRole.RESIDUAL, "size of contract 1"),
        (ParameterRole.READ_OUT, "size of head"),
    ],
)
def test_a_rate_that_is_not_scaled_fails(monkeypatch, part, layer):
    right = mup.rate_multiplier
    monkeypatch.setattr(mup, "rate_multiplier", lambda what, base: 1.0 if what.role is part else right(what, base))
    result = check()
    assert layer in result.failures
    assert result.slopes[layer] > 0.5


def test_structured_factors_that_are_not_scaled_fail(monkeypatch):
    right = mup.rate_multiplier

    def of_the_whole_matrix(what, base):
        """Scale factors as if their fan-in did not depend on the width."""
        return base / 8 if what.role is ParameterRole.HIDDEN and what.fan_in < 64 else right(what, base)

    monkeypatch.setattr(mup, "rate_multiplier", of_the_whole_matrix)
    # The fan-ins of BTT's factors grow as the square root of the width, so the error does too.
    failures = check("btt").failures
    assert {"change of left structure 2", "change of right structure 2"} <= set(failures), failures


def test_embeddings_that_are_scaled_fail(monkeypatch):
    right = mup.rate_multiplier

    def scaled(what, base):
        return base / what.fan_out if what.role is ParameterRole.EMBEDDING else right(what, base)

    monkeypatch.setattr(mup, "rate_multiplier", scaled)
    assert "change of embedding" in check().failures


def test_initial_values_of_fixed_deviation_fail(monkeypatch):
    right = parameters.initialise_

    def fixed(tensor, what):
        right(tensor, what)
        if what.role is ParameterRole.HIDDEN:
            tensor.div_(tensor.std()).mul_(0.02)

    monkeypatch.setattr("structattn.models.pretrained.initialise_", fixed)
    result = check(learning_rate=1e-4)  # A low rate: training must not hide the initial values.
    assert {"size of expand 1", "size of q_proj 1"} <= set(result.failures)


def test_it_is_reproducible():
    assert check(steps=2, seeds=1) == check(steps=2, seeds=1)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((64,), r"widths must be at least two, ascending, got \(64,\)"),
        ((128, 64), "at least two, ascending"),
        ((64, 100), "widths must be multiples of head_dim 32, got 100"),
    ],
)
def test_bad_widths(widths, message):
    with pytest.raises(ValueError, match=message):
        check_coordinates(widths=widths)


def test_plot_shows_both_curves_of_every_layer():
    sizes = {"head": (1.0, 1.0, 1.0), "expand 1": (1.0, 2.0, 4.0)}
    result = CoordinateCheck("standard", True, WIDTHS, sizes, sizes, 0.25)
    assert result.slopes["size of expand 1"] == pytest.approx(1.0)
    assert result.failures == ["size of expand 1", "change of expand 1"]
    figure = result.plot()
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]
    matplotlib.pyplot.close(figure)
