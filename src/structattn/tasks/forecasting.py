"""Forecasting: from the last `T` values of every channel predict the next `H` of every channel.

Shapes: `B` windows, `T` steps of context, `H` steps of horizon, `C` channels.
Source of the setting: Zhou et al., *Informer*, 2021, as later papers read it; arXiv 2509.07963, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structattn import checks
from structattn.tasks.base import Batch, Stream, Task, Totals, generator, places_in_epochs
from structattn.tasks.series import FILLS, Fill, Series, load_series

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class ForecastConfig:
    """Multivariate forecasting: a series, how far back a model looks, and how far ahead it predicts.

    Raises:
        TypeError, ValueError: a field is not of the kind or not in the range it states.
    """

    data: str = "ETTh1"
    """Series: `ETTh1`, `ETTh2`, `ETTm1`, `ETTm2`, or a CSV file; see `structattn.tasks.series`."""

    context_length: int = 512
    """Steps `T` that a prediction looks back."""

    horizon: int = 96
    """Steps `H` to predict."""

    target: str = "OT"
    """The channel that has metrics of its own."""

    time: str = "date"
    """The column of times."""

    columns: tuple[str, ...] = ()
    """The channels; none for every column but `time`."""

    fill: Fill | None = None
    """What to do where values or rows are missing: `forward`, `linear`, `drop`; None to refuse them."""

    season: int = 24
    """Steps of a season, for the seasonal naive forecast that models are compared with."""

    window_norm: str = "last"
    """What a model takes off each context and gives back to its prediction: `last`, `standard` or `none`; see
    `ForecastModelConfig`."""

    evaluation_windows: int = 96
    """Windows of the validation part to evaluate on during training, spread evenly; the test part is read whole."""

    def __post_init__(self) -> None:
        for name in ("data", "target", "time"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r} ({type(value).__name__})")
            if not value:
                raise ValueError(f"{name} must not be empty")
        for name in ("context_length", "horizon", "season", "evaluation_windows"):
            checks.positive_int(name, getattr(self, name))
        if self.season > self.context_length:
            raise ValueError(f"season must be at most the context of {self.context_length} steps, got {self.season}")
        if self.fill is not None:
            checks.one_of("fill", self.fill, FILLS)


class ForecastTask(Task):
    """Windows of a series and the squared error of what comes after each, as `Task` describes.

    A batch has `inputs (B, T, C)` and `targets (B, H, C)`, float32: values standardised by the mean and deviation of
    each channel's training part (a channel that is constant there is only shifted). A model returns `(B, H, C)`.

    *Training order.* Every window of the training part, one at each step of time, is read once in a random order; then
    they are shuffled again.

    *Evaluation.* During training on windows spread evenly over the validation part, at the end on every window of the
    test part: those whose targets lie in the part. Their contexts may begin in the part before, as in the literature.

    *Loss.* Mean squared error over windows, steps and channels.

    *Missing values.* Where the series is filled, targets that were not observed are NaN, and neither loss nor metrics
    nor moments count them; contexts are filled without a look ahead (`Series.windows`).

    Args:
        config: series and lengths.
        seed: names the training order.
        part: the held-out set.

    Raises:
        ValueError: what `load_series` raises, `target` is no channel, a part is too short for a window, or nothing in
            it was observed.
    """

    name: ClassVar[str] = "forecast"
    units: ClassVar[Mapping[str, str]] = {
        "mse": "MSE of standardised values",
        "mae": "MAE of standardised values",
        "target_mae": "MAE of the target, standardised",
        "target_mae_unit": "MAE of the target in its unit",
    }

    def __init__(self, config: ForecastConfig, *, seed: int = 0, part: Part = "validation") -> None:
        super().__init__(seed)
        self.config, self.part = config, part
        self.series = load_series(config.data, time=config.time, columns=config.columns, fill=config.fill)
        checks.one_of(f"target (a channel of {self.series.name})", config.target, self.series.channels)
        self.target = self.series.channels.index(config.target)
        train, validation, test = self.series.borders
        self._check_length("training", train, config.context_length + config.horizon)
        self._check_length("validation", validation - train, config.horizon)
        self._check_length("test", test - validation, config.horizon)
        self.mean, self.deviation = _moments(self.series, train)
        self.training_windows = train - config.context_length - config.horizon + 1
        first, last = (train, validation) if part == "validation" else (validation, test)
        # Where contexts begin: the first window's targets begin with the part, the last one's end with it.
        starts = np.arange(first - config.context_length, last - config.context_length - config.horizon + 1)
        if part == "validation":
            count = min(config.evaluation_windows, len(starts))
            starts = starts[np.arange(count) * (len(starts) - 1) // max(count - 1, 1)]
        self.evaluation_starts: NDArray[np.int64] = starts
        self._check_truth()
        self._last_order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def test(self) -> ForecastTask:
        """The same task with the test part as its held-out set."""
        return ForecastTask(self.config, seed=self.seed, part="test")

    @property
    def context_length(self) -> int:
        """Steps `T` of a context."""
        return self.config.context_length

    @property
    def channels(self) -> int:
        """Channels `C`."""
        return len(self.series.channels)

    @property
    def evaluation_size(self) -> int:
        """Windows of the held-out set."""
        return len(self.evaluation_starts)

    def windows(self, starts: NDArray[np.int64]) -> Batch:
        """The batch whose contexts begin at rows `starts (B,)` of the series."""
        cut = self.series.windows(starts, self.config.context_length, self.config.horizon)
        inputs, targets = (torch.from_numpy(((part - self.mean) / self.deviation).astype(np.float32)) for part in cut)
        return {"inputs": inputs, "targets": targets}

    def in_unit(self, standardised: Tensor) -> Tensor:
        """Standardised values `(…)` of the target in its own unit, float64."""
        return standardised.double() * float(self.deviation[self.target]) + float(self.mean[self.target])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of predictions `(B, H, C)`, over what was observed."""
        errors, observed = self._errors(outputs.float(), batch)
        return errors.square().sum() / observed.sum().clamp(min=1)

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Summed `squared` and `absolute` errors over so many `values`; those of the target over `target_values`."""
        errors, observed = self._errors(outputs.double(), batch)
        return {
            "squared": errors.square().sum(),
            "absolute": errors.abs().sum(),
            "values": observed.sum().double(),
            "target_absolute": errors[..., self.target].abs().sum(),
            "target_values": observed[..., self.target].sum().double(),
        }

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """MSE and MAE over all channels, and MAE of the target, standardised and in its unit."""
        target = totals["target_absolute"].item() / totals["target_values"].item()
        return {
            "mse": totals["squared"].item() / totals["values"].item(),
            "mae": totals["absolute"].item() / totals["values"].item(),
            "target_mae": target,
            "target_mae_unit": target * float(self.deviation[self.target]),
        }

    def _errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prediction less truth, 0 where nothing was observed, and where something was; both `(B, H, C)`."""
        targets = batch["targets"]
        if outputs.shape != targets.shape:
            expected = tuple(targets.shape)
            raise ValueError(f"outputs must be predictions (B, H, C) = {expected}, got {tuple(outputs.shape)}")
        observed = targets.isfinite()
        return torch.where(observed, outputs - targets, 0), observed

    def _check_truth(self) -> None:
        rows = self.evaluation_starts[:, None] + np.arange(self.config.horizon) + self.config.context_length
        if not self.series.observed[rows, self.target].any():
            raise ValueError(
                f"data: the {self.part} part of {self.series.name} has no value of {self.config.target!r} that was "
                "observed: there is nothing to measure a forecast by"
            )

    def _check_length(self, part: str, rows: int, needed: int) -> None:
        if rows < needed:
            config = self.config
            raise ValueError(
                f"data: the {part} part of {self.series.name} has {rows} of its {len(self.series.values)} rows; "
                f"context {config.context_length} and horizon {config.horizon} need at least {needed}"
            )

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        return self.windows(places_in_epochs(step * batch_size, rows, self.training_windows, self._order))

    def _evaluation_rows(self, rows: range) -> Batch:
        return self.windows(self.evaluation_starts[rows.start : rows.stop])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Where each window of `epoch` starts, in the order of reading."""
        known, starts = self._last_order
        if known != epoch:
            starts = generator(self.seed, Stream.WINDOW_ORDER, epoch).permutation(self.training_windows)
            self._last_order = (epoch, starts)
        return starts


def _moments(series: Series, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of what was observed of each channel in the first `rows`; deviation 1 where it is constant,
    up to rounding."""
    values, observed = series.values[:rows], series.observed[:rows]  # No series begins with a value made up.
    mean, deviation = values.mean(axis=0, where=observed), values.std(axis=0, where=observed)
    constant = deviation <= 1e-12 * np.abs(mean)
    return mean, np.where(constant, 1.0, deviation)
