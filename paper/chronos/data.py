"""Series to evaluate forecasts on, each a past and a future."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from structattn import checks
from structattn.tasks.series import Fill, load_series

Metrics = dict[str, float]
"""WQL and MASE, from `structattn.integrations.chronos.sample_metrics`."""


@dataclass(frozen=True)
class DataSet:
    """Series to forecast, each a past and a future.

    The arrays are `past (N, C)` and `future (N, P)`; `season` is the number of steps of a season.
    """

    past: NDArray[np.float64]
    future: NDArray[np.float64]
    season: int

    left_out: int = 0
    """Series that `usable` dropped."""

    def judge(self, samples: NDArray[np.float64]) -> Metrics:
        """Return the metrics of forecasts `(N, S, P)`."""
        from structattn.integrations.chronos import sample_metrics

        return sample_metrics(samples, self.past, self.future, season=self.season)

    def usable(self) -> DataSet:
        """Return the series whose metrics are defined.

        Series with missing values in the future are dropped. So are series whose past is the same in every season.

        Raises:
            ValueError: no series is left, or the past is no longer than a season.
        """
        count, length = self.past.shape
        if self.season >= length:
            raise ValueError(f"season must be below the context of {length} steps, got {self.season}")
        known = np.isfinite(self.future).all(axis=1)
        changes = (self.past[:, self.season :] != self.past[:, : -self.season]).any(axis=1)
        kept = known & changes
        if not kept.any():
            raise ValueError(
                f"series: none of {count} windows can be judged: {count - known.sum()} have missing values in the "
                f"future, and the past of the others repeats itself after {self.season} steps, so that MASE has no "
                "scale"
            )
        return DataSet(self.past[kept], self.future[kept], self.season, int(count - kept.sum()))


@dataclass(frozen=True)
class RealSeries:
    """A real series to forecast zero-shot.

    Windows are taken from its test part. Each channel is a series of its own.

    Raises:
        TypeError, ValueError: a number is not a positive integer.
    """

    data: str
    """Name of a series, or a CSV file. It and the next three fields go to `structattn.tasks.series.load_series`."""

    time: str = "date"
    """Column of times."""

    columns: tuple[str, ...] = ()
    """Columns of the channels; if empty, all but `time`."""

    fill: Fill | None = None
    """Treatment of missing values and rows; None refuses them."""

    season: int = 24
    """Steps of a season."""

    count: int = 16
    """Windows, spread evenly over the test part."""

    def __post_init__(self) -> None:
        checks.positive_int("season", self.season)
        checks.positive_int("count", self.count)

    def windows(self, context_length: int, horizon: int) -> DataSet:
        """Return `count` windows of each channel.

        Raises:
            ValueError: the series cannot be loaded, or its test part is too short.
        """
        series = load_series(self.data, time=self.time, columns=self.columns, fill=self.fill)
        first = max(series.borders[1] - context_length, 0)
        last = series.borders[2] - context_length - horizon
        if last < first:
            raise ValueError(f"series: the test part of {series.name} is shorter than a forecast of {horizon} steps")
        starts = np.unique(np.linspace(first, last, self.count).astype(int))
        past, future = (part.swapaxes(1, 2) for part in series.windows(starts, context_length, horizon))
        return DataSet(past.reshape(-1, context_length), future.reshape(-1, horizon), self.season)
