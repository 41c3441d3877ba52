"""The learning rate as a function of how much of the budget is spent, whatever the budget counts."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]
"""What follows the warm-up."""


def rate_factor(progress: float, *, warmup: float, schedule: Schedule, final: float = 0.0) -> float:
    """Factor on the peak learning rate.

    With `p` the progress, `w` the warm-up's share and `u = (p - w) / (1 - w)`::

        p < w                p / w
        constant             1
        cosine               final + (1 - final) · (1 + cos(π u)) / 2

    Args:
        progress: share of the budget that is spent, in [0, 1]; above 1 counts as 1.
        warmup: share of the budget that warms up linearly, in [0, 1).
        schedule: what follows it.
        final: factor at the end of the cosine, in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    decay = min((progress - warmup) / (1.0 - warmup), 1.0)
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * decay)) / 2.0
