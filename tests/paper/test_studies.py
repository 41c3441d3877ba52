"""The studies of the paper: their trials, findings, figures and power laws."""

import dataclasses
import math

import numpy as np
import pytest

from paper.catalogue import STUDIES, study
from paper.evidence import estimates
from paper.gains import gains
from paper.laws import PowerLaw
from paper.planning import without_seed_and_rate
from paper.report import collect, conclude
from paper.study import Outcome, with_seeds
from structattn.tasks import ForecastConfig, LanguageConfig, RegressionConfig
from tests.tasks import series_files


def outcomes_of(name, loss, seeds=2, scale="small"):
    """Return an outcome for every trial of a study, which ends at `loss(labels)` plus 0.01 per seed."""
    made = []
    for trial in STUDIES[name].trials(scale, "stdlib", seeds):
        labels = trial.all_labels
        last = loss(labels) + 0.01 * labels["seed"]
        budget = labels.get("budget", 1e12)
        flops = 1e12 if isinstance(budget, str) else float(budget)
        rows = tuple(
            {
                "step": step,
                "tokens": step,
                "flops": flops * step / 10,
                "seconds": 1.0,
                metric(trial): last + 1 - step / 10,
            }
            for step in (1, 5, 10)
        )
        made.append(Outcome(labels, 1000, rows))
    return made


def metric(trial):
    """Return the name of the trial's metric."""
    kinds = {
        LanguageConfig: "nats_per_character",
        RegressionConfig: "last_error",
        ForecastConfig: "test_target_mae",
        type(None): "nats_per_token",
    }
    return kinds[type(getattr(trial.config, "task", None))]


# Losses by labels for each study, if the paper is right and if it is wrong.
AS_REPORTED = {
    "bottleneck": lambda at: 0.05 if at["head_rank"] >= at["input_dim"] else 0.7,
    "width": lambda at: 0.5 if at["structure"] == "standard" else 0.1,
    "compute": lambda at: 0.5 if at["structure"] == "standard" else 0.1,
    "scaling": lambda at: (1.5 if at["structure"] == "mlr+paper" else 1.6) * (at["budget"] / 1e12) ** -0.05,
    "recipe": lambda at: 1.5 if at["structure"] == "mlr+paper" else 1.6,
    "reasons": lambda at: 1.5 if at["structure"] == "mlr+paper" else 1.6,
    "mup": lambda at: (
        1.5 + (math.log2(at["learning_rate"]) + 6 + (at["mup"] == "off") * math.log2(at["width"] / 64)) ** 2 / 50
    ),
    "ranks": lambda at: 2.0 if at["ranks"] in ("32", "64") else 1.9,
    "levels": lambda at: 1.7 if at["structure"].endswith("+paper") else 1.8 if at["structure"] == "standard" else 1.75,
    "contexts": lambda at: 1.5 - 0.01 * (at["structure"] == "mlr") * math.log2(at["context"]),
    "forecast": lambda at: 1.0 - 0.1 * (at["structure"] != "standard") * math.log2(at.get("context", 192) / 64),
}
OTHERWISE = {
    "bottleneck": lambda at: 0.7 if at["head_rank"] >= at["input_dim"] else 0.05,
    "width": lambda at: 0.5 if at["structure"] == "btt" else 0.1,
    "compute": lambda at: 0.1 if at["structure"] == "standard" else 0.5,
    "scaling": lambda at: (1.7 if at["structure"] == "mlr+paper" else 1.6) * (at["budget"] / 1e12) ** -0.05,
    "recipe": lambda at: 1.7 if at["structure"] == "mlr+paper" else 1.6,
    "reasons": lambda at: 1.7 if at["structure"] == "mlr+paper" else 1.6,
    "mup": lambda at: (
        1.5 + (math.log2(at["learning_rate"]) + 6 + (at["mup"] == "on") * math.log2(at["width"] / 64)) ** 2 / 50
    ),
    "ranks": lambda at: 1.8 if at["ranks"] in ("32", "64") else 1.9,
    "levels": lambda at: 1.9 if at["structure"].endswith("+paper") else 1.8,
    "contexts": lambda at: 1.5 + 0.01 * (at["structure"] == "mlr") * math.log2(at["context"]),
    "forecast": lambda at: 1.0 + 0.1 * (at["structure"] != "standard") * math.log2(at.get("context", 192) / 64),
}


@pytest.mark.parametrize("name", STUDIES)
class TestEveryStudy:
    @pytest.mark.parametrize("scale", ["small", "paper"])
    def test_trials_differ_in_name_and_config(self, name, scale):
        trials = STUDIES[name].trials(scale, "stdlib", 2)
        assert len({trial.folder for trial in trials}) == len(trials)
        assert len({str(trial.config) for trial in trials}) == len(trials)
        assert {trial.config.seed for trial in trials} == {trial.config.train.seed for trial in trials} == {0, 1}

    def test_small_models_can_be_built(self, name, tmp_path):
        if name == "forecast":
            pytest.importorskip("chronos", reason="chronos is not installed")
        data = series_files.write(tmp_path, series_files.frame(4000)) if name == "forecast" else "stdlib"
        for trial in {
            str(without_seed_and_rate(each.config)): each for each in STUDIES[name].trials("small", data, 1)
        }.values():
            assert trial.config.build_model().num_parameters() > 0

    def test_it_tells_the_paper_from_its_contrary(self, name):
        as_reported = STUDIES[name].finding(outcomes_of(name, AS_REPORTED[name]))
        otherwise = STUDIES[name].finding(outcomes_of(name, OTHERWISE[name]))
        assert as_reported.agrees is True
        assert otherwise.agrees is False
        assert as_reported.statement != otherwise.statement

    def test_one_seed_says_nothing(self, name):
        assert STUDIES[name].finding(outcomes_of(name, AS_REPORTED[name], seeds=1)).agrees is None

    def test_it_says_so_where_nothing_ended(self, name):
        failed = [Outcome(each.labels, 0, error="NaN") for each in outcomes_of(name, AS_REPORTED[name])]
        finding = STUDIES[name].finding(failed)
        assert finding.agrees is None
        assert "ended" in finding.statement

    def test_page_table_and_figure(self, name, tmp_path):
        folder = tmp_path / name
        folder.mkdir()
        outcomes = outcomes_of(name, OTHERWISE[name])
        outcomes[0] = dataclasses.replace(outcomes[0], rows=(), error="loss is NaN at step 3")
        conclude(STUDIES[name], outcomes, "small", folder, ["python", "-m", "paper", name])
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        page = (folder / "README.md").read_text()
        assert "Not as the paper reports" in page
        assert ": loss is NaN at step 3" in page
        assert STUDIES[name].text.reported in page
        assert len((folder / "results.csv").read_text().splitlines()) == 1 + len(outcomes)
        evaluations = sum(len(outcome.rows) for outcome in outcomes)
        assert len((folder / "curves.csv").read_text().splitlines()) == 1 + evaluations
        report = collect(tmp_path).read_text()
        assert "1 of 1 disagrees with the paper" in report
        assert "loss is NaN at step 3" in report


def test_unknown_study():
    with pytest.raises(ValueError, match="did you mean 'width'"):
        study("widht")


def test_scaling_states_exponents():
    finding = STUDIES["scaling"].finding(outcomes_of("scaling", AS_REPORTED["scaling"]))
    assert "mlr+paper 0.05" in finding.statement


def test_what_the_rate_of_the_narrowest_model_costs_the_widest():
    finding = STUDIES["mup"].finding(outcomes_of("mup", AS_REPORTED["mup"]))
    with_it, _, without = finding.statement.partition("Without")
    cost = "At the best rate of D = 64, the loss of the model of D = 256 is {:.3f} nats above its own best."
    assert "the best rates are 2^-6.5 at D = 64, 2^-6.5 at D = 128, 2^-6.5 at D = 256." in with_it
    assert cost.format(0) in with_it
    assert "the best rates are 2^-6.5 at D = 64, 2^-6.5 at D = 128, 2^-8 at D = 256." in without
    assert cost.format(1.5**2 / 50) in without


def test_a_rate_at_which_the_widest_model_does_not_train():
    def lost(at):
        return at["mup"] == "off" and at["width"] == 256 and at["learning_rate"] > 2**-7

    outcomes = [
        dataclasses.replace(each, rows=(), error="NaN") if lost(each.labels) else each
        for each in outcomes_of("mup", AS_REPORTED["mup"])
    ]
    finding = STUDIES["mup"].finding(outcomes)
    without = finding.statement.partition("Without")[2]
    assert "At the best rate of D = 64, the model of D = 256 does not train." in without
    assert finding.agrees


def test_a_difference_within_the_spread_of_seeds_says_nothing():
    outcomes = outcomes_of("ranks", lambda at: 1.9 if at["ranks"] == "32" else 1.895)
    assert STUDIES["ranks"].finding(outcomes).agrees is None


def test_estimates_leave_failed_trials_out():
    good = Outcome({"width": 1, "seed": 0}, 1, ({"last_error": 2.0, "flops": 1},))
    bad = Outcome({"width": 1, "seed": 1}, 1, error="NaN")
    table = estimates([good, bad], "width")
    assert table[1,].mean == 2.0
    assert table[1,].count == 1


def test_seeds_name_the_order_of_data_and_the_dropout():
    trials = STUDIES["width"].trials("small", "stdlib", 1)
    assert [trial.config.train.seed for trial in with_seeds(trials[:1], 3)] == [0, 1, 2]


class TestForecast:
    def test_gains_are_of_runs_with_the_same_seed_and_lengths(self):
        rows = [("standard", 0, 2.0), ("standard", 1, 4.0), ("mlr", 0, 1.0), ("mlr", 1, 5.0), ("mlr", 2, 1.0)]
        found = gains(
            [
                Outcome(
                    {"part": "series", "structure": name, "horizon": 96, "context": 192, "seed": seed},
                    1,
                    ({"test_target_mae": error, "flops": 1},),
                )
                for name, seed, error in rows
            ]
        )
        assert [(gain.seed, gain.percent) for gain in found] == [(0, 50.0), (1, -25.0)]

    def test_seeds_that_differ_say_nothing(self):
        outcomes = [
            dataclasses.replace(each, rows=({**each.rows[-1], "test_target_mae": value},))
            if each.labels["part"] == "series"
            else each
            for each, value in zip(
                outcomes_of("forecast", AS_REPORTED["forecast"]),
                np.random.default_rng(0).uniform(1, 2, 200),
                strict=False,
            )
        ]
        assert STUDIES["forecast"].finding(outcomes).agrees is None


class TestPowerLaw:
    def test_exact_points_are_recovered(self):
        x = np.array([1e12, 2e12, 4e12, 8e12])
        law = PowerLaw.fit(x, 3.0 * x**-0.07)
        assert law.exponent == pytest.approx(0.07)
        np.testing.assert_allclose(law(x), 3.0 * x**-0.07)
        low, high = law.band(x)
        np.testing.assert_allclose(low, high)

    def test_the_band_holds_the_truth(self):
        """It should 95% of the time; the bootstrap of few points is a little narrow."""
        generator, held = np.random.default_rng(0), 0
        x = np.repeat(np.geomspace(1e12, 1e14, 6), 3)
        for seed in range(60):
            y = 3.0 * x**-0.07 * np.exp(0.02 * generator.standard_normal(len(x)))
            low, high = PowerLaw.fit(x, y, draws=200, seed=seed).interval
            held += low <= 0.07 <= high
        assert held >= 50

    def test_bad_input(self):
        with pytest.raises(ValueError, match="two different budgets"):
            PowerLaw.fit([1.0, 1.0], [2.0, 3.0])
        with pytest.raises(ValueError, match="above 0"):
            PowerLaw.fit([1.0, 2.0], [2.0, -3.0])
