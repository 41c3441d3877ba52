"""Write numbers alike in every table, figure and sentence."""

from __future__ import annotations

from structattn.comparison.estimate import Estimate


def format_estimate(estimate: Estimate) -> str:
    """Return `1.482 ± 0.003`, or the mean alone."""
    if estimate.standard_error is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} ± {number(estimate.standard_error)}"


def number(value: float) -> str:
    """Return three decimals, or two significant digits if the number is small."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def magnitude(value: float) -> str:
    """Return three digits and a prefix: `812k`, `1.20M`, `118T`."""
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E", "Z")):
        scaled = value / 1000**power
        if scaled < 999.5:
            digits = 0 if scaled >= 99.95 or not power else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{prefix}"
    return f"{value:.2e}"


def grouped(value: float) -> str:
    """Return a whole number with thousands separated: `12,345`."""
    return f"{value:,.0f}"
