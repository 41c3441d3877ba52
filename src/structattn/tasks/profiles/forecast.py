"""Define settings and profile of multivariate forecasting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from structattn import checks
from structattn.tasks.presets import FORECAST_PRESETS
from structattn.tasks.profiles.forecast_figures import forecast_panels, target_errors
from structattn.tasks.profiles.profile import Metrics, TaskCommand, TaskFigure, TaskProfile

if TYPE_CHECKING:
    from structattn.models import StructuredModel
    from structattn.tasks.forecasting import ForecastTask

Fill = Literal["forward", "linear", "drop"]
"""Ways to fill missing values and rows: repeat the last value, interpolate, or leave such rows out."""


@dataclass(frozen=True)
class ForecastConfig:
    """Settings of multivariate forecasting: series, context and horizon.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    data: str = "ETTh1"
    """Series: `ETTh1`, `ETTh2`, `ETTm1`, `ETTm2`, or a CSV file with a column of times and columns of
    numbers."""

    context_length: int = 512
    """Steps `T` to look back."""

    horizon: int = 96
    """Steps `H` to predict."""

    target: str = "OT"
    """Column with metrics of its own."""

    time: str = "date"
    """Column of times."""

    columns: tuple[str, ...] = ()
    """Columns to read and predict; all but the times by default."""

    fill: Fill | None = None
    """For missing values and rows: repeat the last, interpolate, or leave out; refused by default."""

    season: int = 24
    """Steps of a season, for the seasonal naive baseline."""

    window_norm: Literal["last", "standard", "none"] = "last"
    """Normalisation of each context, undone in its forecast: last value, mean and deviation, or none."""

    evaluation_windows: int = 96
    """Windows of the validation part to evaluate on, spread evenly. The test part is evaluated completely."""

    def __post_init__(self) -> None:
        for name in ("data", "target", "time"):
            checks.text(name, getattr(self, name))
        for name in ("context_length", "horizon", "season", "evaluation_windows"):
            checks.positive_int(name, getattr(self, name))
        if self.season > self.context_length:
            raise ValueError(f"season must be at most the context of {self.context_length} steps, got {self.season}")
        if self.fill is not None:
            checks.one_of("fill", self.fill, get_args(Fill))


def _build(config: ForecastConfig, seed: int, total_steps: int) -> ForecastTask:
    from structattn.tasks.forecasting import ForecastTask

    return ForecastTask(config, seed=seed)


def _model() -> type[StructuredModel]:
    from structattn.models import ForecastModel

    return ForecastModel


def _model_fields(config: ForecastConfig) -> dict[str, Any]:
    from structattn.tasks.forecasting import ForecastTask

    channels = ForecastTask(config).channels
    return {"horizon": config.horizon, "window_norm": config.window_norm, "channels": channels}


def _baselines(task: ForecastTask) -> dict[str, Metrics]:
    from structattn.tasks.forecast_baselines import Forecaster, forecaster_metrics, last_season, last_value, linear

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


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Add the season of the series."""
    from structattn.tasks.ett import default_season

    return {"season": default_season(fields["data"]), **fields}


FORECAST = TaskProfile(
    name="forecast",
    config=ForecastConfig,
    build=_build,
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
    command=TaskCommand(
        summary="Multivariate forecasting of a time series, with baselines without attention.",
        compared=("standard", "mlr+paper+levels=2", "mlr+paper+levels=4"),
        trained="mlr+paper+levels=4",
        examples="standard, mlr, mlr+paper+levels=2, mlr:8,4,4, swa:32, btt, …",
        presets={name: asdict(row) for name, row in FORECAST_PRESETS.items()},
        hidden=("evaluation_windows",),
        derived={"season": "a day of ETT files, 24 steps of others"},
        complete=_complete,
    ),
)
