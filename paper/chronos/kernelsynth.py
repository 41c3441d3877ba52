"""Draw synthetic time series from Gaussian processes with random compositions of kernels.

A composition joins one to five kernels from left to right, each time by `+` or `x` with equal chance. The bank of
kernels has periods of calendars, trends, smooth changes and noise. A step is 1/1024 units of time at every length.

Source of the idea and of the bank: KernelSynth in Ansari et al., *Chronos: Learning the Language of Time Series*, 2024,
arXiv 2403.07815, section 4.2 and appendix A.
"""

from __future__ import annotations

import enum
import functools
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structattn import checks
from structattn.tasks.randomness import check_seed

STEPS = 1024
"""Steps in a unit of time, the unit of the length scales of trends and smooth changes."""

PERIODS = (4, 6, 7, 10, 12, 14, 24, 26, 30, 40, 48, 52, 60, 96, 168, 336, 365, 672, 730)
"""Periods of the bank, in steps: parts and multiples of hours, days, weeks, months, quarters and years."""

MOST_KERNELS = 5
"""Most kernels in a composition."""

# Added to the diagonal, as a share of the mean variance: covariances of smooth processes are singular to rounding and
# have no Cholesky factor. It is far below the width of a tokenizer's bin.
_JITTER = 1e-8


class Split(enum.IntEnum):
    """Training or held-out compositions.

    Compositions of the same index in both splits are independent.
    """

    TRAINING = 0
    HELD_OUT = 1


def synthetic_series(
    seed: int, index: int, length: int, *, paths: int = 1, split: Split = Split.TRAINING
) -> NDArray[np.float64]:
    """Return sample paths of one random composition.

    On one machine they depend on the arguments alone. With `K`, the composition's covariance at `length` steps, and
    `C Cᵀ = K`, the paths are `C z` with `z ~ N(0, I)`.

    Args:
        seed: seed of the data set.
        index: number of the composition, from 0.
        length: steps of a path.
        paths: number of paths; one factorisation serves all.
        split: training or held-out.

    Returns:
        `(paths, length)`.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range.
        ImportError: without scikit-learn, naming the extra that brings it.
    """
    checks.positive_int("length", length)
    checks.positive_int("paths", paths)
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"index must be an integer, got {index!r} ({type(index).__name__})")
    if index < 0:
        raise ValueError(f"index must be at least 0, got {index}")
    draws = np.random.default_rng((check_seed(seed), split, index))
    covariance = _compose(draws)(np.arange(length)[:, None] / STEPS)
    # The trace is 0 where the only kernel is a trend through the origin and the series has one step.
    covariance[np.diag_indices(length)] += _JITTER * max(covariance.trace() / length, _JITTER)
    noise = draws.standard_normal((length, paths))
    series: NDArray[np.float64] = (np.linalg.cholesky(covariance) @ noise).T
    return series


def _compose(draws: np.random.Generator) -> Any:
    """Return a random composition of kernels of the bank."""
    bank = _bank()
    chosen = draws.integers(len(bank), size=draws.integers(1, MOST_KERNELS + 1)).tolist()
    kernel = bank[chosen[0]]
    for number in chosen[1:]:
        join = operator.add if draws.integers(2) else operator.mul
        kernel = join(kernel, bank[number])
    return kernel


@functools.cache
def _bank() -> tuple[Any, ...]:
    """Return the kernels of compositions, those of scikit-learn."""
    kernels = checks.require("sklearn.gaussian_process.kernels", "paper")
    return (
        *(kernels.ExpSineSquared(periodicity=period / STEPS) for period in PERIODS),
        *(kernels.DotProduct(sigma_0=start) for start in (0.0, 1.0, 10.0)),
        *(kernels.RBF(length_scale=scale) for scale in (0.1, 1.0, 10.0)),
        *(kernels.RationalQuadratic(alpha=mixture) for mixture in (0.1, 1.0, 10.0)),
        *(kernels.WhiteKernel(noise_level=level) for level in (0.1, 1.0)),
        kernels.ConstantKernel(),
    )
