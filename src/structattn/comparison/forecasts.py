"""Stretches of a series that forecasts are shown on, the target channel in its own unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from structattn.tasks import ForecastTask
from structattn.tasks.forecasters import Forecaster

SHOWN = 3
"""How many stretches."""


def stretches(task: ForecastTask) -> list[dict[str, Any]]:
    """Windows spread over the held-out set: when the horizon `begins`, the `history` before it, and the `truth`.

    The history is as long as the horizon, or the context where that is shorter. None is what was not observed.
    """
    config, found = task.config, []
    seen, numbers = (part[:, task.target].tolist() for part in (task.series.observed, task.series.values))
    values = [number if known else None for known, number in zip(seen, numbers, strict=True)]
    for start in _starts(task):
        begins = start + config.context_length
        found.append(
            {
                "begins": str(np.datetime_as_string(task.series.times[begins], unit="m")).replace("T", " "),
                "history": values[max(start, begins - config.horizon) : begins],
                "truth": values[begins : begins + config.horizon],
            }
        )
    return found


@torch.no_grad()
def forecasts(task: ForecastTask, forecaster: Forecaster) -> list[list[float]]:
    """What `forecaster` predicts of the target on each of `stretches`."""
    outputs = forecaster(task.windows(_starts(task))["inputs"])
    predicted: list[list[float]] = task.in_unit(outputs[..., task.target]).tolist()
    return predicted


def _starts(task: ForecastTask) -> NDArray[np.int64]:
    """The middles of equal parts of the held-out set."""
    return task.evaluation_starts[(2 * np.arange(SHOWN) + 1) * task.evaluation_size // (2 * SHOWN)]
