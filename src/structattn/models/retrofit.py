"""Old name of `structattn.models.mlr_conversion`, which goes with the next release."""

import warnings

from structattn.models.mlr_conversion import OrderSource as Order
from structattn.models.mlr_conversion import TokenPairs as Pairs
from structattn.models.mlr_conversion import convert_to_mlr as retrofit
from structattn.models.mlr_conversion import measure_head_moments as measure_moments

__all__ = ["Order", "Pairs", "measure_moments", "retrofit"]

warnings.warn("structattn.models.retrofit is now structattn.models.mlr_conversion", DeprecationWarning, stacklevel=2)
