"""Estimate means over seeds, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t: the value that 2.5% of draws exceed, for 1 to 10 degrees of freedom.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z_975 = 1.95996


@dataclass(frozen=True)
class Estimate:
    """Mean of independent numbers of one distribution."""

    mean: float
    """The mean."""

    standard_error: float | None
    """Sample deviation over the root of the count; None for a single number."""

    count: int
    """Number of values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from one or more values."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    @property
    def margin(self) -> float | None:
        """Half of the mean's 95% interval (Student's t); None for one number."""
        return None if self.standard_error is None else t_quantile(self.count - 1) * self.standard_error


def above_zero(estimate: Estimate) -> bool | None:
    """Return True above 0, None if the 95% interval contains 0."""
    if estimate.margin is None or abs(estimate.mean) <= estimate.margin:
        return None
    return estimate.mean > 0


def t_quantile(degrees: int) -> float:
    """Return the 97.5% point of Student's t distribution.

    Beyond 10 degrees of freedom, two terms of the Cornish-Fisher series.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
