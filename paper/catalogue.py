"""All studies by name."""

from __future__ import annotations

from paper.contexts import Contexts
from paper.forecast import Forecast
from paper.learning_rates import Mup
from paper.levels import Levels
from paper.ranks import Ranks
from paper.reasons import Reasons
from paper.recipe import Recipe
from paper.regression import Bottleneck, Compute, Width
from paper.scaling import Scaling
from paper.study import Study
from structattn import checks

STUDIES: dict[str, Study] = {
    each.name: each
    for each in (
        Bottleneck(),
        Width(),
        Compute(),
        Scaling(),
        Recipe(),
        Reasons(),
        Mup(),
        Ranks(),
        Levels(),
        Contexts(),
        Forecast(),
    )
}


def study(name: str) -> Study:
    """Return the study of that name.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    return STUDIES[checks.one_of("study", name, STUDIES)]
