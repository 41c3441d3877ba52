"""Provide structured matrices: `Structure`, seven families, a table of costs."""

from structattn.structures.base import Structure
from structattn.structures.butterfly import Butterfly
from structattn.structures.contraction import Level
from structattn.structures.families import BTT, MLR, LowRank, Monarch
from structattn.structures.kronecker import Kronecker
from structattn.structures.mlbtc import MLBTC
from structattn.structures.table import summary

__all__ = [
    "BTT",
    "MLBTC",
    "MLR",
    "Butterfly",
    "Kronecker",
    "Level",
    "LowRank",
    "Monarch",
    "Structure",
    "summary",
]
