"""Define the profile of multivariate forecasting: its baselines and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from structattn.tasks.forecast_baselines import Forecaster, forecaster_metrics, last_season, last_value, linear
from structattn.tasks.forecasting import ForecastConfig, ForecastTask
from structattn.tasks.profiles.forecast_figures import forecast_panels, target_errors
from structattn.tasks.profiles.profile import Metrics, TaskFigure, TaskProfile

if TYPE_CHECKING:
    from structattn.models import StructuredModel


def _model() -> type[StructuredModel]:
    from structattn.models import ForecastModel

    return ForecastModel


def _model_fields(config: ForecastConfig) -> dict[str, Any]:
    channels = ForecastTask(config).channels
    return {"horizon": config.horizon, "window_norm": config.window_norm, "channels": channels}


def _baselines(task: ForecastTask) -> dict[str, Metrics]:
    test = task.test()
    forecasters: dict[str, Forecaster] = {
        "linear": linear(task),
        f"seasonal ({task.config.season})": last_season(task),
        "last value": last_value(task),
    }
    rows: dict[str, Metrics] = {}
    for name, forecaster in forecasters.items():
        tested: Metrics = {**forecaster_metrics(test, forecaster), **test.example_predictions(forecaster)}
        rows[name] = {**forecaster_metrics(task, forecaster), **{f"test_{key}": value for key, value in tested.items()}}
    return rows


FORECAST = TaskProfile(
    name=ForecastTask.name,
    config=ForecastConfig,
    build=lambda config, seed, total_steps: ForecastTask(config, seed=seed),
    model=_model,
    model_fields=_model_fields,
    question="Which attention structure forecasts this series best, and does it beat forecasts without it?",
    setting=(
        "Each model reads the last values of every channel, all steps attending to one another, and predicts the next "
        "values of every channel. Values are standardised by the training part. Curves show the validation part. The "
        "table shows the end of training on every window of the test part, which no choice was based on. The linear "
        "forecast is ridge regression on the same context, in closed form."
    ),
    quantity="test error",
    columns={
        "test_mse": "MSE",
        "test_mae": "MAE",
        "test_target_mae": "target MAE",
        "test_target_mae_unit": "in its unit",
    },
    wide_columns=("test_target_mae",),
    baselines=_baselines,
    baselines_compete=True,
    is_causal=False,
    figures=(
        TaskFigure(
            "forecasts",
            "Forecasts of the target",
            "Three stretches of the test part, the channel that `--target` named, in its own unit: history, truth, and "
            "the forecasts of each model of the first seed and of the linear baseline.",
            forecast_panels,
        ),
        TaskFigure(
            "target-error",
            "Error of the target",
            "Mean absolute error of the target on the test part, standardised. Dots are seeds; bars are the mean "
            "and, from two seeds on, its 95% interval. Lines are forecasts without attention.",
            target_errors,
        ),
    ),
    unmeasured=("Other series, horizons and splits: this is one stretch of one series.",),
)
