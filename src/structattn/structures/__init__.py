"""Structured matrices: one face (`Structure`), many families."""

from structattn.structures.base import Structure
from structattn.structures.contraction import Level
from structattn.structures.families import BTT, MLR, LowRank, Monarch
from structattn.structures.mlbtc import MLBTC

__all__ = ["BTT", "MLBTC", "MLR", "Level", "LowRank", "Monarch", "Structure"]
