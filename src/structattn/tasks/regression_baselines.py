"""Solve the held-out prompts by least squares, ridge and zero.

Functions return the squared error over `d` at every point `i = 1..N`, `(N,)` float64, predicted from the `i - 1` points
before it. It is the `error_by_position` of `RegressionTask.metrics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structattn import checks
from structattn.tasks.regression import RegressionTask

_BATCH = 32  # The projectors of a batch then fit in the cache of one core.
_RELATIVE_TOLERANCE = 1e-10


def least_squares_error(task: RegressionTask) -> Tensor:
    """Return the error of least squares, of minimum norm where underdetermined.

    No predictor can do better here. In expectation it is `1 - (i - 1) / d` at point `i <= d`, and it is 0
    from point `d + 1` on, since the targets carry no noise.
    """
    return _recursive_error(task, penalty=0.0)


def ridge_error(task: RegressionTask, penalty: float) -> Tensor:
    """Return the error of ridge regression on the points before `i`.

    The weights are `w = argmin Σ_j (y_j - wᵀ x_j)² + penalty · |w|²`.

    Raises:
        ValueError: `penalty` is not positive.
    """
    if checks.finite("penalty", penalty) <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    return _recursive_error(task, float(penalty))


def zero_error(task: RegressionTask) -> Tensor:
    """Return the error of always answering 0: `y² / d`, 1 in expectation."""
    total = sum(batch["targets"].double().square().sum(dim=0) for batch in task.evaluation_batches(_BATCH))
    return torch.as_tensor(total) / (task.evaluation_size * task.config.input_dim)


def _recursive_error(task: RegressionTask, penalty: float) -> Tensor:
    total = sum(
        _recursive_squared_error(batch["inputs"][:, 0::2].double(), batch["targets"].double(), penalty).sum(dim=0)
        for batch in task.evaluation_batches(_BATCH)
    )
    return torch.as_tensor(total) / (task.evaluation_size * task.config.input_dim)


def _recursive_squared_error(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Return each point's squared error from a fit to those before.

    With `P = penalty · (X Xᵀ + penalty · I)⁻¹` of the points so far, a new point `(x, y)` changes the weights by
    `P x (y - wᵀ x) / (penalty + xᵀ P x)` (Sherman–Morrison). As the penalty goes to 0, `P` becomes the projector
    onto the complement of the points so far, and the weights become the interpolating ones of minimum norm.

    Args:
        x: `(B, N, d)` float64.
        y: `(B, N)` float64, without noise.
        penalty: ridge penalty, or 0 for the limit.

    Returns:
        `(B, N)` float64.
    """
    batch, points, dim = x.shape
    weight = x.new_zeros(batch, dim)
    spread = torch.eye(dim, dtype=x.dtype).repeat(batch, 1, 1)
    errors = torch.empty_like(y)
    for i in range(points):
        residual = y[:, i] - (weight * x[:, i]).sum(dim=-1)
        errors[:, i] = residual.square()
        direction = torch.bmm(spread, x[:, i, :, None]).squeeze(-1)
        denominator = penalty + (direction * x[:, i]).sum(dim=-1)
        # A point in the span of those before it adds nothing: do not amplify rounding into a step.
        fresh = denominator > _RELATIVE_TOLERANCE * x[:, i].square().sum(dim=-1)
        inverse = torch.where(fresh, 1.0 / denominator, 0.0)
        weight += direction * (residual * inverse)[:, None]
        spread.baddbmm_(direction[:, :, None], (direction * inverse[:, None])[:, None, :], alpha=-1.0)
    return errors
