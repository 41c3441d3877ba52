"""What in-context regression can be compared with: least squares, ridge and zero, on the held-out prompts.

Each gives the squared error over `d` at every point `i = 1..N`, predicted from the `i - 1` points before it, as
`RegressionTask.metrics` gives it for a model under `error_by_position`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structattn import checks
from structattn.tasks.regression import RegressionTask

_BATCH = 32  # So that the projectors of a batch stay in the cache of one core.
_RELATIVE_TOLERANCE = 1e-10


def least_squares_error(task: RegressionTask) -> Tensor:
    """Error of least squares, the one of least norm while there are fewer points than dimensions.

    It is the best any predictor can do here. In expectation it is `1 - (i - 1) / d` at point `i <= d`, and it is 0
    from point `d + 1` on, since the targets carry no noise.

    Args:
        task: whose held-out prompts to predict.

    Returns:
        `(N,)` float64, squared error over `d` at each point.
    """
    return _recursive_error(task, penalty=0.0)


def ridge_error(task: RegressionTask, penalty: float) -> Tensor:
    """Error of ridge regression, `w = argmin Σ_j (y_j - wᵀ x_j)² + penalty · |w|²` over the points before `i`.

    Args:
        task: whose held-out prompts to predict.
        penalty: weight of the squared norm, positive.

    Returns:
        `(N,)` float64, squared error over `d` at each point.

    Raises:
        ValueError: `penalty` is not positive.
    """
    if checks.finite("penalty", penalty) <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    return _recursive_error(task, float(penalty))


def zero_error(task: RegressionTask) -> Tensor:
    """Error of always answering 0: `y² / d`, 1 in expectation at every point.

    Args:
        task: whose held-out prompts to predict.

    Returns:
        `(N,)` float64, squared error over `d` at each point.
    """
    total = sum(batch["targets"].double().square().sum(dim=0) for batch in task.evaluation_batches(_BATCH))
    return torch.as_tensor(total) / (task.evaluation_size * task.config.input_dim)


def _recursive_error(task: RegressionTask, penalty: float) -> Tensor:
    total = sum(
        _recursive_squared_error(batch["inputs"][:, 0::2].double(), batch["targets"].double(), penalty).sum(dim=0)
        for batch in task.evaluation_batches(_BATCH)
    )
    return torch.as_tensor(total) / (task.evaluation_size * task.config.input_dim)


def _recursive_squared_error(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Squared error at each point of the fit to the points before it, one rank-one update per point.

    With `P = penalty · (X Xᵀ + penalty · I)⁻¹` of the points so far, a new point `(x, y)` changes the weights by
    `P x (y - wᵀ x) / (penalty + xᵀ P x)` (Sherman–Morrison). As the penalty goes to 0, `P` becomes the projector
    onto what no point has spanned yet, and the weights the interpolating ones of least norm.

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
        # A point within the span of those before it teaches nothing: rounding must not be amplified into a step.
        fresh = denominator > _RELATIVE_TOLERANCE * x[:, i].square().sum(dim=-1)
        inverse = torch.where(fresh, 1.0 / denominator, 0.0)
        weight += direction * (residual * inverse)[:, None]
        spread.baddbmm_(direction[:, :, None], (direction * inverse[:, None])[:, None, :], alpha=-1.0)
    return errors
