"""Read multivariate time series from CSV files.

A file has one column of times; the others are numbers. Errors number rows from 1, below the heading.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from structattn import checks
from structattn.tasks.ett import ETT, ett_path
from structattn.tasks.profiles.forecast import Fill

_DAY = 86_400 * 10**9
_MISSING = ("", "na", "n/a", "nan", "null", "none")
_TRAIN_SHARE, _TEST_SHARE = 0.7, 0.2
_HOW_TO_FILL = "fill must choose what to do: forward (repeat the last value), linear (interpolate) or drop (leave out)"


@dataclass(frozen=True, eq=False)
class Series:
    """Values of `C` channels at `N` times, in three parts."""

    name: str
    """The series that the user asked for."""

    channels: tuple[str, ...]
    """Names of the channels."""

    times: NDArray[np.datetime64]
    """`(N,)`, ascending."""

    values: NDArray[np.float64]
    """`(N, C)`, finite: missing values are filled."""

    observed: NDArray[np.bool_]
    """`(N, C)`, false where a value was filled."""

    borders: tuple[int, int, int]
    """Rows where the training, validation and test parts end."""

    def windows(
        self, starts: NDArray[np.int64], context_length: int, horizon: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the pasts that start at rows `starts (B,)`, and their futures.

        Args:
            starts: first row of each past.
            context_length: rows `T` of a past.
            horizon: rows `H` of a future.

        Returns:
            Pasts `(B, T, C)`, filled. Values missing at the end of a past repeat the last observed one, however the
            series is filled, since interpolation would look ahead. Futures `(B, H, C)`, NaN where nothing was
            observed, so that no filled value counts as truth.
        """
        rows = starts[:, None] + np.arange(context_length + horizon)
        past, future = np.split(self.values[rows], [context_length], axis=1)
        if self._complete:
            return past, future
        seen, truth = np.split(self.observed[rows], [context_length], axis=1)
        at_end = np.logical_and.accumulate(~seen[:, ::-1], axis=1)[:, ::-1]
        past = np.where(at_end, self._carried[rows[:, :context_length]], past)
        return past, np.where(truth, future, np.nan)

    @functools.cached_property
    def _complete(self) -> bool:
        return bool(self.observed.all())

    @functools.cached_property
    def _carried(self) -> NDArray[np.float64]:
        """`(N, C)`, the last value observed up to each row."""
        last = np.maximum.accumulate(np.where(self.observed, np.arange(len(self.values))[:, None], 0), axis=0)
        return np.take_along_axis(self.values, last, axis=0)


def load_series(data: str, *, time: str = "date", columns: Sequence[str] = (), fill: Fill | None = None) -> Series:
    """Return the series that `data` names.

    ETTh1, ETTh2, ETTm1 and ETTm2, by name or as files of that name, are split as in the literature: 12, 4 and 4
    months of 30 days. Others are split 70%, 10%, 20%.

    Args:
        data: `ETTh1`, `ETTh2`, `ETTm1` or `ETTm2` (downloaded once into the cache folder), or a CSV file with a
            heading, UTF-8.
        time: column of times, ISO 8601, ascending at regular intervals.
        columns: channels; if empty, every column but `time`.
        fill: treatment of missing values and rows: repeat the last value, interpolate, or leave rows out and join their
            neighbours. `Series.windows` keeps filled values out of futures.

    Raises:
        ImportError: without pandas, naming the extra that brings it.
        TypeError: `data` is not a string.
        ValueError: there is no such file or column, a cell is no number or no time, times repeat, go back or are
            irregular, or values are missing and `fill` is None; names row and column.
    """
    checks.text("data", data)
    if fill is not None:
        checks.one_of("fill", fill, get_args(Fill))
    path = ett_path(data) if data in ETT else Path(data).expanduser()
    try:
        status = path.stat()
    except OSError as error:
        names = ", ".join(ETT)
        raise ValueError(f"data must be {names} or a CSV file, got {data!r}: {error.strerror}") from error
    return _load(data, path, (status.st_mtime_ns, status.st_size), time, tuple(columns), fill)


@functools.lru_cache(maxsize=2)
def _load(data: str, path: Path, stamp: Any, time: str, columns: tuple[str, ...], fill: Fill | None) -> Series:
    """Read a file once for all runs; `stamp` changes with the file."""
    frame = _read(path)
    names = list(map(str, frame.columns))
    for name in (time, *columns):
        checks.one_of(f"a column of {path.name}", name, names)
    channels = columns or tuple(name for name in names if name != time)
    if not channels or time in channels or len(set(channels)) < len(channels):
        raise ValueError(f"columns must name one or more channels of {path.name} once each, got {', '.join(channels)}")
    if len(frame) < 3:
        raise ValueError(f"data: {path} must have three rows or more, got {len(frame)}")
    times, values = _times(frame, time, path), _numbers(frame, channels, path)
    times, values = _regular(times, values, fill, path)
    times, values, observed = _whole(times, values, channels, fill, path)
    return Series(data, channels, times, values, observed, _borders(path.stem, len(values)))


def _borders(stem: str, rows: int) -> tuple[int, int, int]:
    if stem in ETT and rows >= ETT[stem].borders[-1]:
        return ETT[stem].borders
    return int(_TRAIN_SHARE * rows), rows - int(_TEST_SHARE * rows), rows


# --- cells ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """Return the file as a frame of text."""
    pandas = checks.require("pandas", "forecast")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error.reason}") from error
    except (pandas.errors.ParserError, pandas.errors.ParserWarning, pandas.errors.EmptyDataError) as error:
        raise ValueError(f"data: {path} is no table: {error}") from error
    return frame


def _times(frame: Any, column: str, path: Path) -> NDArray[np.datetime64]:
    pandas = checks.require("pandas", "forecast")
    times = pandas.to_datetime(frame[column], format="ISO8601", utc=True, errors="coerce")
    if times.isna().any():
        row = int(times.isna().to_numpy().argmax())
        raise ValueError(
            f"data: {path}, row {row + 1}, column {column!r}: expected a time such as 2016-07-01 00:00:00, "
            f"got {frame[column][row]!r}"
        )
    result: NDArray[np.datetime64] = times.dt.tz_localize(None).to_numpy().astype("datetime64[ns]")
    return result


def _numbers(frame: Any, channels: Sequence[str], path: Path) -> NDArray[np.float64]:
    """Return `(N, C)`, NaN where a value is missing."""
    pandas = checks.require("pandas", "forecast")
    values = np.empty((len(frame), len(channels)))
    wrong = np.zeros(values.shape, dtype=bool)
    for place, name in enumerate(channels):
        text = frame[name].str.strip()
        missing = text.str.lower().isin(_MISSING).to_numpy()
        values[:, place] = pandas.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
        wrong[:, place] = ~np.isfinite(values[:, place]) & ~missing
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        name = channels[place]
        raise ValueError(
            f"data: {path}, row {row + 1}, column {name!r}: expected a finite number, got {frame[name][row]!r}"
        )
    return values


# --- times and missing values -----------------------------------------------------------------------------------------

Samples = tuple[NDArray[np.datetime64], NDArray[np.float64]]


def _regular(times: NDArray[np.datetime64], values: NDArray[np.float64], fill: Fill | None, path: Path) -> Samples:
    """Return the series at regular times, NaN in gaps unless dropped."""
    distances = np.diff(times).astype(np.int64)
    if (distances <= 0).any():
        row = int((distances <= 0).argmax())
        fault, cure = "is earlier than", "sort rows by time"
        if distances[row] == 0:
            fault, cure = "repeats", "a time has one row"
        raise ValueError(
            f"data: {path}, row {row + 2}: {_text(times[row + 1])} {fault} the time of the row before; {cure}"
        )
    lengths, counts = np.unique(distances, return_counts=True)
    step = lengths[counts.argmax()]
    if len(lengths) == 1 or (lengths[0] >= _DAY and _on_calendar(times)):
        return times, values
    usual = f"where most rows are {_duration(step)} apart"
    if (distances % step).any():
        row = int((distances % step != 0).argmax())
        raise ValueError(
            f"data: {path}, row {row + 2} comes {_duration(distances[row])} after the row before, {usual}: "
            "times must be regular"
        )
    row = int((distances != step).argmax())
    gap = f"data: {path} has gaps, the first from row {row + 1} to {row + 2}, {_duration(distances[row])}, {usual}"
    if fill is None:
        raise ValueError(f"{gap}; {_HOW_TO_FILL}")
    if fill == "drop":
        return times, values
    places = np.concatenate([[0], np.cumsum(distances // step)])
    if places[-1] >= 2 * len(times):
        raise ValueError(f"{gap}; they are longer than the data, which fill = {fill!r} would make up")
    whole = np.full((places[-1] + 1, values.shape[1]), np.nan)
    whole[places] = values
    return times[0] + np.arange(len(whole)) * np.timedelta64(step, "ns"), whole


def _whole(
    times: NDArray[np.datetime64], values: NDArray[np.float64], channels: Sequence[str], fill: Fill | None, path: Path
) -> tuple[NDArray[np.datetime64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return the series without NaN, and where values were observed."""
    missing = np.isnan(values)
    if not missing.any():
        return times, values, ~missing
    if fill is None:
        row, place = np.argwhere(missing)[0]
        raise ValueError(
            f"data: {path} has {missing.sum()} missing values, the first in row {row + 1}, "
            f"column {channels[place]!r}; {_HOW_TO_FILL}"
        )
    if fill == "drop":
        kept = ~missing.any(axis=1)
        if not kept.any():
            raise ValueError(f"data: {path} misses a value in every row, so that fill = 'drop' would leave none")
        return times[kept], values[kept], ~missing[kept]
    frame = checks.require("pandas", "forecast").DataFrame(values)
    filled = (frame.ffill() if fill == "forward" else frame.interpolate(limit_area="inside")).to_numpy()
    if np.isnan(filled).any():
        row, place = np.argwhere(np.isnan(filled))[0]
        raise ValueError(
            f"data: {path}: fill = {fill!r} has no value of {channels[place]!r} to fill from at {_text(times[row])}"
        )
    return times, filled, ~missing


def _on_calendar(times: NDArray[np.datetime64]) -> bool:
    """Return True for days regular on the calendar, such as month starts."""
    pandas = checks.require("pandas", "forecast")
    return pandas.infer_freq(pandas.DatetimeIndex(times)) is not None


def _text(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="s")).replace("T", " ")


def _duration(nanoseconds: int) -> str:
    return str(checks.require("pandas", "forecast").Timedelta(int(nanoseconds), "ns"))
