"""Calibrated tolerance: a result may err at most twice as much as plain PyTorch does in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """A result's distance from the truth, and how much of it is allowed."""

    what: str
    error: float
    """Largest error of an entry."""
    allowed: float
    at: tuple[int, ...]
    """Indices of the entry."""
    problem: str | None = None
    """Fault other than the error: shape, dtype, or numbers that are not finite."""

    @property
    def message(self) -> str | None:
        """Say in a line what is wrong; None if nothing is."""
        if self.problem is not None:
            return f"{self.what}: {self.problem}"
        if self.error <= self.allowed:
            return None
        return f"{self.what}: error {self.error:.3g}, allowed {self.allowed:.3g}, at {self.at}"

    def check(self) -> None:
        """Assert that nothing is wrong."""
        assert self.message is None, self.message


def deviation(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result", largest_term: float | None = None
) -> Deviation:
    """The distance of `actual` from the float64 `exact`: at most twice that of `plain`, plus two roundings, is allowed.

    `plain` is the same computation by plain PyTorch in `actual`'s dtype. It may be exact by luck, for instance where
    only one key is visible; so two roundings of the largest term that the computation sums are always allowed. That
    term is the largest entry of `exact` unless it is given: where large terms cancel, the result is smaller than they
    are. In float64 `exact` is no better than `actual`: a relative 1e-10 is allowed, and as much for small entries.
    """
    actual, exact, plain = actual.detach(), exact.detach(), plain.detach()
    if actual.shape != exact.shape:
        return _wrong(what, f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    if actual.dtype != plain.dtype:
        return _wrong(what, f"expected {plain.dtype}, got {actual.dtype}")
    finite = torch.isfinite(actual)
    if not finite.all():
        return _wrong(what, "not finite", _place(~finite))
    if not exact.numel():
        return Deviation(what, 0.0, 0.0, ())
    errors = (actual.to(exact.dtype) - exact).abs()
    if actual.dtype == torch.float64:
        errors = errors / (1 + exact.abs())
        allowed = 1e-10
    else:
        rounding = torch.finfo(actual.dtype).eps * (largest_term or float(exact.abs().max()))
        allowed = 2 * (float((plain.to(exact.dtype) - exact).abs().max()) + rounding)
    return Deviation(what, float(errors.max()), allowed, _place(errors))


def assert_calibrated(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result", largest_term: float | None = None
) -> None:
    """Assert that `deviation` is allowed."""
    deviation(actual, exact, plain, what, largest_term).check()


def _wrong(what: str, problem: str, at: tuple[int, ...] = ()) -> Deviation:
    return Deviation(what, float("inf"), 0.0, at, problem)


def _place(entries: Tensor) -> tuple[int, ...]:
    """Indices of the first of the largest entries."""
    return tuple(map(int, torch.unravel_index(entries.to(torch.float64).argmax(), entries.shape)))
