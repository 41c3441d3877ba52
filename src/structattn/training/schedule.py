"""Set the learning rate by the spent share of the budget."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]
"""Shape of the learning rate after the warm-up."""


def rate_factor(progress: float, *, warmup: float, schedule: Schedule, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate.

    With progress `p`, warm-up share `w` and `u = (p - w) / (1 - w)`::

        p < w                p / w
        constant             1
        cosine               final + (1 - final) · (1 + cos(π u)) / 2

    Args:
        progress: share of the budget that is spent, in [0, 1]; above 1 counts as 1.
        warmup: share of the budget for the linear warm-up, in [0, 1).
        schedule: shape after the warm-up.
        final: factor at the end of the cosine, in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    decay = min((progress - warmup) / (1.0 - warmup), 1.0)
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * decay)) / 2.0
