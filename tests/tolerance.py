"""Calibrated tolerance: a result may err at most twice as much as plain PyTorch does in the same dtype."""

import torch
from torch import Tensor


def assert_calibrated(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result", largest_term: float | None = None
) -> None:
    """Assert that `actual` errs from the float64 `exact` at most twice as much as `plain`, plus two roundings.

    `plain` is the same computation by plain PyTorch in `actual`'s dtype. It may be exact by luck, for instance where
    only one key is visible; so two roundings of the largest term that the computation sums are always allowed. That
    term is the largest entry of `exact` unless it is given: where large terms cancel, the result is smaller than they
    are. In float64 `exact` is no better than `actual`: a relative 1e-10 is allowed.
    """
    assert actual.shape == exact.shape, f"{what}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: expected {plain.dtype}, got {actual.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not exact.numel():
        return
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10, msg=lambda message: f"{what}: {message}")
        return
    error, allowed = _error(actual, exact), _error(plain, exact)
    rounding = torch.finfo(actual.dtype).eps * (largest_term or float(exact.abs().max()))
    assert error <= 2 * (allowed + rounding), f"{what}: error {error:.3g}, plain PyTorch's {allowed:.3g}"


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.to(exact.dtype) - exact).abs().max())
