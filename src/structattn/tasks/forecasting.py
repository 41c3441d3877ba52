"""Predict the next `H` values of channels from the last `T`.

Shapes: `B` windows, `T` steps of context, `H` steps of horizon, `C` channels.
Source of the setting: Zhou et al., *Informer*, 2021, as later papers read it; arXiv 2509.07963, section 6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structattn import checks
from structattn.tasks.profiles.forecast import ForecastConfig
from structattn.tasks.randomness import Stream, generator, places_in_epochs
from structattn.tasks.series import Series, load_series
from structattn.tasks.task import Batch, Task, Totals

HeldOut = Literal["validation", "test"]

_EXAMPLES = 3


class ForecastTask(Task):
    """Windows of a series, and the squared error of their forecasts.

    A batch has `inputs (B, T, C)` and `targets (B, H, C)`, float32, standardised by the mean and deviation of each
    channel's training part (a channel that is constant there is only shifted). A model returns `(B, H, C)`.

    *Training order.* A window starts at each time step of the training part. All are read once in a random order, then
    shuffled again.

    *Evaluation.* During training, on windows spread evenly over the validation part; at the end, on every window of the
    test part. The targets of a window lie in the part; its context may start in the part before, as in the literature.

    *Loss.* Mean squared error over windows, steps and channels.

    *Missing values.* Targets that were not observed are NaN; loss, metrics and moments leave them out. Contexts are
    filled without looking ahead (`Series.windows`).

    Args:
        config: the settings.
        seed: selects the training order.
        part: the part that is held out.

    Raises:
        ValueError: as `load_series`, `target` is no channel, a part is too short for a window, or the target was never
            observed in it.
    """

    name: ClassVar[str] = "forecast"
    units: ClassVar[Mapping[str, str]] = {
        "mse": "MSE of standardised values",
        "mae": "MAE of standardised values",
        "target_mae": "MAE of the target, standardised",
        "target_mae_unit": "MAE of the target in its unit",
    }

    def __init__(self, config: ForecastConfig, *, seed: int = 0, part: HeldOut = "validation") -> None:
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
        # Starts of contexts: targets of the first window start with the part, those of the last end with it.
        starts = np.arange(first - config.context_length, last - config.context_length - config.horizon + 1)
        if part == "validation":
            count = min(config.evaluation_windows, len(starts))
            starts = starts[np.arange(count) * (len(starts) - 1) // max(count - 1, 1)]
        self.evaluation_starts: NDArray[np.int64] = starts
        self._check_truth()
        self._order = functools.lru_cache(maxsize=1)(self._draw_order)

    def test(self) -> ForecastTask:
        """Return the same task with the test part held out."""
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
        """Return the batch whose contexts start at rows `starts (B,)`."""
        cut = self.series.windows(starts, self.config.context_length, self.config.horizon)
        inputs, targets = (torch.from_numpy(((part - self.mean) / self.deviation).astype(np.float32)) for part in cut)
        return {"inputs": inputs, "targets": targets}

    def in_unit(self, standardised: Tensor) -> Tensor:
        """Return standardised values `(…)` of the target in its own unit, float64."""
        return standardised.double() * float(self.deviation[self.target]) + float(self.mean[self.target])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error of predictions `(B, H, C)` over observed values."""
        errors, observed = self._errors(outputs.float(), batch)
        return errors.square().sum() / observed.sum().clamp(min=1)

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return summed errors and counts, over all channels and of the target."""
        errors, observed = self._errors(outputs.double(), batch)
        return {
            "squared": errors.square().sum(),
            "absolute": errors.abs().sum(),
            "values": observed.sum().double(),
            "target_absolute": errors[..., self.target].abs().sum(),
            "target_values": observed[..., self.target].sum().double(),
        }

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return MSE and MAE over all channels, and MAE of the target."""
        target = totals["target_absolute"].item() / totals["target_values"].item()
        return {
            "mse": totals["squared"].item() / totals["values"].item(),
            "mae": totals["absolute"].item() / totals["values"].item(),
            "target_mae": target,
            "target_mae_unit": target * float(self.deviation[self.target]),
        }

    @property
    def data_summary(self) -> str:
        """Channels, target, rows of each part, and the lengths."""
        names, parts = ", ".join(self.series.channels), self.series.borders
        return (
            f"{self.series.name}: {len(self.series.channels)} channels ({names}), the target {self.config.target}; "
            f"{parts[0]:,} rows to train on, {parts[1] - parts[0]:,} to validate on, {parts[2] - parts[1]:,} to test "
            f"on; the next {self.config.horizon} from the last {self.context_length}"
        )

    def examples(self) -> list[dict[str, Any]]:
        """Return three held-out windows, the target in its own unit.

        Each has the time at which the horizon `begins`, the `history` before it, and the `truth`. The history is as
        long as the horizon, or the context where that is shorter. None is a value that was not observed.
        """
        config, found = self.config, []
        seen, numbers = (part[:, self.target].tolist() for part in (self.series.observed, self.series.values))
        values = [number if known else None for known, number in zip(seen, numbers, strict=True)]
        for start in self._example_starts():
            begins = start + config.context_length
            found.append(
                {
                    "begins": str(np.datetime_as_string(self.series.times[begins], unit="m")).replace("T", " "),
                    "history": values[max(start, begins - config.horizon) : begins],
                    "truth": values[begins : begins + config.horizon],
                }
            )
        return found

    @torch.no_grad()
    def example_predictions(self, predict: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return `forecasts`, the target on each of `examples`, in its own unit."""
        outputs = predict(self.windows(self._example_starts())["inputs"])
        return {"forecasts": self.in_unit(outputs[..., self.target]).tolist()}

    def _example_starts(self) -> NDArray[np.int64]:
        """Return the middles of equal parts of the held-out set."""
        return self.evaluation_starts[(2 * np.arange(_EXAMPLES) + 1) * self.evaluation_size // (2 * _EXAMPLES)]

    def _errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return errors `(B, H, C)`, 0 where not observed, and where observed."""
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

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """Return where each window of `epoch` starts, in training order."""
        return generator(self.seed, Stream.WINDOW_ORDER, epoch).permutation(self.training_windows)


def _moments(series: Series, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each channel's mean and deviation, 1 where it is constant."""
    values, observed = series.values[:rows], series.observed[:rows]  # A series starts with an observed value.
    mean, deviation = values.mean(axis=0, where=observed), values.std(axis=0, where=observed)
    constant = deviation <= 1e-12 * np.abs(mean)
    return mean, np.where(constant, 1.0, deviation)
