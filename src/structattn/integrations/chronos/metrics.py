"""Compute WQL and MASE of sampled forecasts, by gluonts.

Forecasts here are sample paths of single series, as arrays; `structattn.tasks` has metrics and baselines of its
forecasting task. WQL is the weighted quantile loss, MASE the mean absolute scaled error.

Shapes: `N` series, `S` samples, `C` past values, `P` values to forecast.

With `y` the true value, `q_α` a forecast's quantile `α` (sample number `(S - 1) α`, rounded, of `S` sorted samples
counted from 0), and `e` the mean absolute difference between a past and itself a season earlier::

    WQL   = mean over α = 0.1, …, 0.9 of  2 Σ max(α (y - q_α), (1 - α)(q_α - y)) / Σ |y|     over series and steps
    MASE  = mean over series and steps of  |y - q_0.5| / e

Source: Ansari et al., *Chronos*, 2024, arXiv 2403.07815, section 5.4 and appendix D.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from chronos import ChronosPipeline
from numpy.typing import ArrayLike, NDArray

from structattn import checks

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantiles of the weighted quantile loss."""

Array = NDArray[np.float64]


def forecast(
    pipeline: ChronosPipeline, past: ArrayLike, horizon: int, *, samples: int = 20, batch_size: int = 32, seed: int = 0
) -> Array:
    """Return sample paths of the future of each series.

    Args:
        pipeline: draws the samples.
        past: `(N, C)`, `C` at most the model's context length.
        horizon: `P`, at most the model's prediction length.
        samples: `S`, paths of each series.
        batch_size: series in a batch.
        seed: seed of the random numbers.

    Returns:
        `(N, S, P)`.

    Raises:
        TypeError, ValueError: `past` or `horizon` is longer than the model's, or an argument is out of range.
    """
    contexts = _matrix("past", past)
    _at_most("past", contexts.shape[1], pipeline.model_context_length)
    _at_most("horizon", checks.positive_int("horizon", horizon), pipeline.model_prediction_length)
    batches = torch.from_numpy(contexts).float().contiguous().split(checks.positive_int("batch_size", batch_size))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [pipeline.predict(batch, horizon, checks.positive_int("samples", samples)) for batch in batches]
    return torch.cat(drawn).double().numpy()


def seasonal_naive_samples(past: ArrayLike, horizon: int, season: int) -> Array:
    """Repeat the last season as one sample path, `(N, 1, P)`.

    `season=1` repeats the last value.

    Raises:
        ValueError: `season` is longer than the past.
    """
    contexts = _matrix("past", past)
    if checks.positive_int("season", season) > contexts.shape[1]:
        raise ValueError(f"season must be at most the {contexts.shape[1]} values of the past, got {season}")
    places = contexts.shape[1] - season + np.arange(checks.positive_int("horizon", horizon)) % season
    return contexts[:, None, places]


def sample_metrics(samples: ArrayLike, past: ArrayLike, future: ArrayLike, *, season: int) -> dict[str, float]:
    """Return `wql`, `mase` and `mase_median`.

    `mase_median` is the median over series of the mean over steps. A few series whose past hardly changes can dominate
    the mean of MASE, but not its median.

    Args:
        samples: forecasts `(N, S, P)`.
        past: `(N, C)`, whose seasonal differences scale MASE.
        future: true values `(N, P)`.
        season: steps of a season; 1 for none.

    Raises:
        ValueError: shapes do not fit; a number is not finite; a past repeats itself exactly after a season, so that
            MASE has no scale; or all true values are zero, so that WQL has no scale.
        ImportError: without gluonts, naming the extra that brings it.
    """
    paths = np.asarray(samples, dtype=np.float64)
    known, truth = _matrix("past", past), _matrix("future", future)
    if paths.ndim != 3 or paths.shape[::2] != truth.shape or len(known) != len(truth):
        raise ValueError(
            f"samples, past and future must be (N, S, P), (N, C) and (N, P), got {paths.shape}, {known.shape} and "
            f"{truth.shape}"
        )
    if not np.isfinite(paths).all():
        raise ValueError("samples must be finite")
    if checks.positive_int("season", season) >= known.shape[1]:
        raise ValueError(f"season must be below the {known.shape[1]} values of the past, got {season}")
    ev = checks.require("gluonts.ev.metrics", "chronos")
    scale = checks.require("gluonts.ev.ts_stats", "chronos").seasonal_error(known, season, time_axis=-1)
    if not scale.all():
        raise ValueError(f"past of series {int((scale == 0).argmax())} repeats itself after {season} steps: no MASE")
    if not truth.any():
        raise ValueError("future must not be zero everywhere: no weighted quantile loss")
    data = {"label": truth, "seasonal_error": scale}
    ranked = np.sort(paths, axis=1)
    data |= {str(quantile): ranked[:, round((paths.shape[1] - 1) * quantile)] for quantile in QUANTILES}

    def value(metric: Any, axis: int | tuple[int, int] = (0, 1)) -> Any:
        return metric(axis=axis).update(data).get()

    return {
        "wql": float(value(ev.MeanWeightedSumQuantileLoss(list(QUANTILES)))),
        "mase": float(value(ev.MASE())),
        "mase_median": float(np.median(value(ev.MASE(), axis=1))),
    }


def _at_most(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(f"{name} must be at most the {limit} values that the model was made for, got {length}")


def _matrix(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a matrix, a row for each series, got the shape {array.shape}")
    if not np.isfinite(array).all():
        row, place = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} must be finite, got {array[row, place]} in series {row} at step {place}")
    return array
