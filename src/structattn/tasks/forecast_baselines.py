"""Forecast by last value, last season, or a linear map.

Shapes: `B` windows, `T` steps of context, `H` steps of horizon, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structattn.tasks.forecasting import ForecastTask

Forecaster = Callable[[Tensor], Tensor]
"""Maps contexts `(B, T, C)` to predictions `(B, H, C)`."""

_BATCH = 256
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def forecaster_metrics(task: ForecastTask, forecaster: Forecaster) -> dict[str, float | list[float]]:
    """Return the task's metrics of `forecaster` on its held-out windows."""
    batches = [task.totals(forecaster(batch["inputs"]), batch) for batch in task.evaluation_batches(_BATCH)]
    return task.metrics({name: torch.stack([each[name] for each in batches]).sum(dim=0) for name in batches[0]})


def last_value(task: ForecastTask) -> Forecaster:
    """Return a forecaster that repeats the last value of the context."""
    horizon = task.config.horizon
    return lambda inputs: inputs[:, -1:].expand(-1, horizon, -1)


def last_season(task: ForecastTask) -> Forecaster:
    """Return a forecaster that repeats the last season of `S` steps.

    Step `h` ahead is `x[T - S + (h mod S)]`: the seasonal naive forecast.
    """
    season = task.config.season
    places = task.config.context_length - season + torch.arange(task.config.horizon) % season
    return lambda inputs: inputs[:, places]


@dataclass(frozen=True)
class LinearForecaster:
    """A linear forecaster with one matrix for all channels.

    `y_h = x_T + Σ_t W[h, t] (x_t - x_T)`
    """

    weight: NDArray[np.float64]
    """`W (H, T)`; its last column has no effect."""

    penalty: float
    """Penalty of the ridge regression, over the mean square of `x_t - x_T`."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return predictions `(B, H, C)`, float64."""
        last = inputs[:, -1:].double()
        return last + torch.einsum("ht,btc->bhc", torch.from_numpy(self.weight), inputs.double() - last)


def linear(task: ForecastTask) -> LinearForecaster:
    """Fit ridge regression to every training window; validate its penalty.

    DLinear (Zeng et al., *Are Transformers Effective for Time Series Forecasting?*, 2023) maps the trend and the
    remainder of the context by a matrix each. Both are linear in the context, so their sum is one matrix, fitted here
    directly. Subtracting the last value, as the same authors' NLinear does, lets it follow a drift. Of several
    penalties the one with the lowest mean squared error on validation windows is taken.
    """
    gram, cross = _normal_equations(task)
    scale = np.trace(gram) / len(gram)
    validation = ForecastTask(replace(task.config, evaluation_windows=len(task.series.values)))  # all of them
    if scale == 0:  # No channel ever changes.
        return LinearForecaster(np.zeros(cross.T.shape), _PENALTIES[0])
    fitted = [
        LinearForecaster(np.linalg.solve(gram + penalty * scale * np.eye(len(gram)), cross).T, penalty)
        for penalty in _PENALTIES
    ]
    return min(fitted, key=lambda one: float(np.mean(forecaster_metrics(validation, one)["mse"])))


def _normal_equations(task: ForecastTask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return `XᵀX (T, T)` and `XᵀY (T, H)` over windows and channels.

    The last value of each context is subtracted. Windows of a channel whose future was not completely observed are left
    out.
    """
    length, horizon = task.config.context_length, task.config.horizon
    gram, cross = np.zeros((length, length)), np.zeros((length, horizon))
    for starts in np.array_split(np.arange(task.training_windows), -(-task.training_windows // _BATCH)):
        batch = task.windows(starts)
        past, future = (batch[name].double().numpy().swapaxes(1, 2) for name in ("inputs", "targets"))
        known = np.isfinite(future).all(axis=-1)
        x, y = (rows[known] - past[known][:, -1:] for rows in (past, future))
        gram += x.T @ x
        cross += x.T @ y
    return gram, cross
