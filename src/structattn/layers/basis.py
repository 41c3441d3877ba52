"""Old name of `structattn.layers.head_basis`, which goes with the next release."""

import warnings

from structattn.layers.head_basis import HeadBasis as Basis
from structattn.layers.head_basis import Moments, MomentSums
from structattn.layers.head_basis import balancing_maps as balanced
from structattn.layers.head_basis import order_pairs_by_energy as by_pair_energy

__all__ = ["Basis", "MomentSums", "Moments", "balanced", "by_pair_energy"]

warnings.warn("structattn.layers.basis is now structattn.layers.head_basis", DeprecationWarning, stacklevel=2)
