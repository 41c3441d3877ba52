"""Every study by its name."""

from __future__ import annotations

from paper.forecast import Forecast
from paper.language import Mup, Ranks, Scaling
from paper.regression import Bottleneck, Compute, Width
from paper.study import Study
from structattn import checks

STUDIES: dict[str, Study] = {
    each.name: each for each in (Bottleneck(), Width(), Compute(), Scaling(), Mup(), Ranks(), Forecast())
}


def study(name: str) -> Study:
    """The study of that name; ValueError with the nearest name otherwise."""
    return STUDIES[checks.one_of("study", name, STUDIES)]
