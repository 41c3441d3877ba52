"""Forecasting: windows, splits, standardisation, metrics and baselines."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")

from structattn.tasks import ForecastConfig, ForecastTask, build_task
from structattn.tasks.forecast_baselines import LinearForecaster, forecaster_metrics, last_season, last_value, linear
from tests.tasks.battery import TaskBattery, assert_same, joined
from tests.tasks.series_files import frame, write

REAL = Path(__file__).parents[2] / "../shared/data/ett/ETTh1.csv"
SMALL = {"context_length": 12, "horizon": 5, "season": 6, "evaluation_windows": 10}


def config(path, **fields):
    return ForecastConfig(path, **SMALL | fields)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path)


class TestForecastTask(TaskBattery):
    @pytest.fixture(autouse=True)
    def file(self, path):
        self.path = path

    def make(self, seed=0):
        return ForecastTask(config(self.path), seed=seed)

    def outputs(self, batch):
        return batch["inputs"][:, -5:] / 2


class TestTestPart(TestForecastTask):
    def make(self, seed=0):
        return super().make(seed).test()


def test_windows_are_consecutive_and_standardised_by_the_training_part(path):
    task = ForecastTask(config(path))
    train = frame()[["north", "south", "OT"]].to_numpy()[:210]
    np.testing.assert_allclose(task.mean, train.mean(axis=0))
    np.testing.assert_allclose(task.deviation, train.std(axis=0))
    batch = task.windows(np.array([3]))
    whole = torch.cat([batch["inputs"], batch["targets"]], dim=1)[0]
    np.testing.assert_allclose(whole, ((train - task.mean) / task.deviation)[3:20], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(task.in_unit(whole[:, task.target]), train[3:20, 2], rtol=1e-6)


def test_an_epoch_reads_every_training_window_once_and_none_reaches_beyond(path):
    task = ForecastTask(config(path))
    count = 210 - 12 - 5 + 1
    assert task.training_windows == count
    starts = np.concatenate([task._order(epoch) for epoch in (0, 1)])
    for epoch in (starts[:count], starts[count:]):
        assert sorted(epoch) == list(range(count))
    assert (starts[:count] != starts[count:]).any()
    rows = joined([task.batch(step, 4) for step in range(count // 4 + 1)])
    assert_same({name: rows[name][:count] for name in rows}, task.windows(starts[:count]))


def test_parts_hold_the_same_targets_as_in_the_literature(path):
    task = ForecastTask(config(path, evaluation_windows=1000))
    assert task.series.borders == (210, 240, 300)
    # Targets fill rows 210 to 239; the first context is the end of the training part.
    assert task.evaluation_starts.tolist() == list(range(210 - 12, 240 - 12 - 5 + 1))
    test = task.test()
    assert test.evaluation_starts.tolist() == list(range(240 - 12, 300 - 12 - 5 + 1))
    few = ForecastTask(config(path, evaluation_windows=4)).evaluation_starts
    assert (few[0], few[-1], len(few)) == (task.evaluation_starts[0], task.evaluation_starts[-1], 4)
    assert ForecastTask(config(path, evaluation_windows=1)).evaluation_size == 1


def test_metrics_by_hand(path):
    task = ForecastTask(config(path, horizon=2))
    task.deviation = np.array([1.0, 1.0, 3.0])
    targets = torch.zeros(2, 2, 3)
    outputs = torch.tensor([[[1.0, 0, 0], [0, 2, 0]], [[0, 0, -4], [0, 0, 1]]])
    batch = {"inputs": torch.zeros(2, 12, 3), "targets": targets}
    metrics = task.metrics(task.totals(outputs, batch))
    expected = {"mse": 22 / 12, "mae": 8 / 12, "target_mae": 5 / 4, "target_mae_unit": 15 / 4}
    assert metrics == pytest.approx(expected)
    assert task.loss(outputs, batch).item() == pytest.approx(22 / 12)


@pytest.mark.filterwarnings("ignore:Using `json`-module")  # What gluonts says when it is imported.
def test_metrics_are_those_of_gluonts(path):
    evaluation = pytest.importorskip("gluonts.evaluation.metrics", reason="gluonts is not installed")
    task = ForecastTask(config(path))
    batch = next(task.test().evaluation_batches(8))
    outputs = last_value(task)(batch["inputs"]) + torch.randn(8, 5, 3)
    metrics = task.metrics(task.totals(outputs, batch))
    truth, forecast = batch["targets"].double().numpy(), outputs.double().numpy()
    assert metrics["mse"] == pytest.approx(evaluation.mse(truth, forecast))
    assert metrics["mae"] == pytest.approx(evaluation.abs_error(truth, forecast) / truth.size)
    one = evaluation.abs_error(truth[..., 2], forecast[..., 2]) / truth[..., 2].size
    assert metrics["target_mae"] == pytest.approx(one)


def test_a_constant_channel_is_only_shifted(tmp_path):
    made = frame()
    made["south"] = 7.1
    task = ForecastTask(config(write(tmp_path, made)))
    batch = joined([task.windows(np.arange(283))])
    for part in batch.values():
        assert part[..., 1].abs().max() < 1e-6
        assert part.isfinite().all()
    assert all(np.isfinite(value) for value in forecaster_metrics(task, linear(task)).values())
    made["north"] = made["OT"] = 0.0
    task = ForecastTask(config(write(tmp_path, made)))
    assert forecaster_metrics(task.test(), linear(task))["mse"] == pytest.approx(0, abs=1e-10)


def missing(made, rows, column="OT"):
    made = made.astype(object)
    made.loc[rows, column] = ""
    return made


def test_filled_values_are_not_counted(tmp_path):
    """Metrics, loss and moments count observed values alone."""
    rows = np.arange(300)[np.random.default_rng(0).random(300) < 0.3][1:]
    rows = rows[(rows > 0) & (rows < 299)]
    task = ForecastTask(config(write(tmp_path, missing(frame(), rows)), fill="linear"))
    observed = np.delete(frame()["OT"].to_numpy()[:210], rows[rows < 210])
    assert (task.mean[2], task.deviation[2]) == pytest.approx((observed.mean(), observed.std()))
    batch = task.windows(task.evaluation_starts)
    known = batch["targets"].isfinite()
    assert 0.6 < known[..., 2].double().mean() < 0.8
    outputs = torch.randn(batch["targets"].shape, requires_grad=True)
    errors = (outputs - batch["targets"])[known].double()
    metrics = task.metrics(task.totals(outputs, batch))
    assert metrics["mse"] == pytest.approx(errors.square().mean().item())
    assert metrics["mae"] == pytest.approx(errors.abs().mean().item())
    ours = (outputs - batch["targets"])[..., 2][known[..., 2]].abs().double().mean().item()
    assert metrics["target_mae"] == pytest.approx(ours)
    loss = task.loss(outputs, batch)
    loss.backward()
    assert loss.item() == pytest.approx(metrics["mse"])
    assert ((outputs.grad == 0) == ~known).all()
    assert all(np.isfinite(value) for value in forecaster_metrics(task.test(), linear(task)).values())


def test_filling_does_not_look_ahead(tmp_path):
    """White noise cannot be forecast; an interpolated context that ends with a gap would leak it."""
    made, noise = frame(), np.random.default_rng(1).standard_normal((300, 3))
    made[["north", "south", "OT"]] = noise
    rows = np.arange(2, 299, 4)
    task = ForecastTask(config(write(tmp_path, missing(made, rows)), fill="linear", horizon=1)).test()
    metrics = forecaster_metrics(task, lambda inputs: 2 * inputs[:, -1:] - inputs[:, -2:-1])
    assert metrics["target_mae"] > 0.8


def test_a_part_without_the_target_is_refused(tmp_path):
    path = write(tmp_path, missing(frame(), range(208, 243)))
    with pytest.raises(ValueError, match=r"the validation part .* has no value of 'OT' that was observed"):
        ForecastTask(config(path, fill="forward"))


# --- forecasters ------------------------------------------------------------------------------------------------------


def test_naive_forecasters_by_hand(path):
    task = ForecastTask(config(path, horizon=8))
    inputs = torch.arange(12.0)[None, :, None].repeat(2, 1, 3)
    assert last_value(task)(inputs)[1, :, 2].tolist() == [11.0] * 8
    assert last_season(task)(inputs)[0, :, 0].tolist() == [6, 7, 8, 9, 10, 11, 6, 7]


def test_a_linear_recurrence_is_continued(tmp_path):
    """The fit finds the linear rule that a sine around any level satisfies in all channels."""
    made = frame()
    hours = np.arange(len(made))
    for place, name in enumerate(("north", "south", "OT")):
        made[name] = 5 * place + (1 + place) * np.sin(hours / 6 + place)
    task = ForecastTask(config(write(tmp_path, made)))
    assert forecaster_metrics(task.test(), linear(task))["mse"] < 1e-3
    assert forecaster_metrics(task.test(), last_value(task))["mse"] > 0.1


def test_linear_solves_the_ridge_equations(path):
    task = ForecastTask(config(path))
    found = linear(task)
    batch = task.windows(np.arange(task.training_windows))
    last = batch["inputs"][:, -1:]
    x = (batch["inputs"] - last).double().transpose(1, 2).flatten(0, 1).numpy()
    y = (batch["targets"] - last).double().transpose(1, 2).flatten(0, 1).numpy()
    penalty = found.penalty * np.trace(x.T @ x) / 12
    residual = x.T @ (x @ found.weight.T - y) + penalty * found.weight.T
    np.testing.assert_allclose(residual, 0, atol=1e-7 * np.abs(x.T @ y).max())
    errors = forecaster_metrics(task, found)
    others = [LinearForecaster(found.weight * factor, 0.0) for factor in (0.5, 1.5)]
    assert all(errors["mse"] < forecaster_metrics(task, other)["mse"] for other in others)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not beside the project")
def test_the_real_file_gives_the_numbers_of_the_literature():
    """At horizon 96 the last value has error 1.29, a linear map of 336 steps 0.37 to 0.38 (DLinear's paper)."""
    task = ForecastTask(ForecastConfig(str(REAL), 336, 96)).test()
    assert task.series.borders == (8_640, 11_520, 14_400)
    assert task.evaluation_size == 2880 - 96 + 1
    assert forecaster_metrics(task, last_value(task))["mse"] == pytest.approx(1.294, abs=2e-3)
    metrics = forecaster_metrics(task, linear(task))
    assert metrics["mse"] == pytest.approx(0.372, abs=0.006)
    assert metrics["target_mae_unit"] == pytest.approx(metrics["target_mae"] * task.deviation[-1])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target": "OTT"},
            r"target \(a channel of .*\) must be one of north, south, OT, got 'OTT'; did you mean 'OT'",
        ),
        (
            {"context_length": 206},
            "the training part .* has 210 of its 300 rows; context 206 and horizon 5 need .* 211",
        ),
        ({"horizon": 31}, "the validation part .* has 30 of its 300 rows; context 12 and horizon 31 need at least 31"),
        ({"columns": ("north",), "target": "OT"}, r"target .* must be one of north, got 'OT'"),
    ],
)
def test_settings_that_do_not_fit_the_series_are_refused(path, fields, message):
    with pytest.raises(ValueError, match=message):
        ForecastTask(config(path, **fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": 3}, TypeError, "data must be a string, got 3"),
        ({"data": ""}, ValueError, "data must not be empty"),
        ({"target": None}, TypeError, "target must be a string, got None"),
        ({"context_length": 0}, ValueError, "context_length must be a positive integer, got 0"),
        ({"horizon": 1.5}, TypeError, "horizon must be a positive integer, got 1.5"),
        ({"season": 13}, ValueError, "season must be at most the context of 12 steps, got 13"),
        ({"evaluation_windows": 0}, ValueError, "evaluation_windows must be a positive integer, got 0"),
        ({"fill": "back"}, ValueError, "fill must be one of forward, linear, drop, got 'back'"),
    ],
)
def test_bad_configs_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        ForecastConfig(**{"data": "x.csv", **SMALL, **fields})


def test_build_task(path):
    task = build_task(config(path), seed=3, total_steps=1000)
    assert isinstance(task, ForecastTask)
    assert (task.seed, task.part, task.test().part) == (3, "validation", "test")
    assert dataclasses.replace(task.config, horizon=4).horizon == 4
