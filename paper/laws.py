"""Fit power laws to losses at several budgets, with confidence bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PowerLaw:
    """Power law `loss = scale · compute^-exponent` with bootstrap fits.

    Fits are by least squares of logarithms.

    Attributes:
        scale: loss at compute 1.
        exponent: exponent of the fall.
        draws: `(n, 2)`, logarithm of the scale and exponent of the bootstrap fits.
    """

    scale: float
    exponent: float
    draws: NDArray[np.float64]

    @classmethod
    def fit(cls, compute: Sequence[float], loss: Sequence[float], *, draws: int = 1000, seed: int = 0) -> PowerLaw:
        """Fit the law to points of at least two different budgets.

        Raises:
            ValueError: there are fewer budgets, or a number is not above 0.
        """
        x, y = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
        if len(set(compute)) < 2:
            raise ValueError(f"compute must hold two different budgets or more, got {sorted(set(compute))}")
        if not ((x > 0) & (y > 0)).all():
            raise ValueError("compute and loss must be above 0")
        x, y = np.log(x), np.log(y)
        intercept, slope = _fit_line(x, y)
        generator = np.random.default_rng(seed)
        fits: list[tuple[float, float]] = []
        while len(fits) < draws:
            chosen = generator.integers(len(x), size=len(x))
            if len(set(x[chosen])) > 1:  # a single budget has no slope
                fits.append(_fit_line(x[chosen], y[chosen]))
        return cls(math.exp(intercept), -slope, np.array(fits) * (1.0, -1.0))

    def __call__(self, compute: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the loss at some compute."""
        return np.asarray(self.scale * compute**-self.exponent)

    def band(self, compute: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the 95% band of the bootstrap losses at some compute."""
        log = self.draws[:, :1] - self.draws[:, 1:] * np.log(compute)[None]
        low, high = np.quantile(np.exp(log), [0.025, 0.975], axis=0)
        return low, high

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% interval of the bootstrap exponents."""
        low, high = np.quantile(self.draws[:, 1], [0.025, 0.975])
        return float(low), float(high)


def _fit_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line."""
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    return float(y.mean() - slope * x.mean()), slope
