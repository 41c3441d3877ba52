"""Every study by its name."""

from __future__ import annotations

from structattn import checks
from structattn.studies.paper.forecast import Forecast
from structattn.studies.paper.language import Mup, Ranks, Scaling
from structattn.studies.paper.regression import Bottleneck, Compute, Width
from structattn.studies.paper.study import Study

STUDIES: dict[str, Study] = {
    each.name: each for each in (Bottleneck(), Width(), Compute(), Scaling(), Mup(), Ranks(), Forecast())
}


def study(name: str) -> Study:
    """The study of that name; ValueError with the nearest name otherwise."""
    return STUDIES[checks.one_of("study", name, STUDIES)]
