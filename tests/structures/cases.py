"""Cases of the battery of structures: add a line to run all its tests on a family."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from structattn.structures import BTT, MLBTC, MLR, Butterfly, Kronecker, Level, LowRank, Monarch, Structure

MIXED = (
    Level.low_rank(12, 20, 1, weight=-2.0),
    Level(3, 2, 2, 5, 1, blocks=2, weight=0.5),
    Level(4, 3, 2, 10),
)


@dataclass(frozen=True)
class Case:
    """A member, and the numbers of Table 1 worked out by hand for one matrix."""

    make: Callable[..., Structure]
    dims: tuple[int, int]
    parameters: int
    rank: int
    feature_dim: int


CASES = {
    "lowrank-16": Case(lambda **kw: LowRank(16, 16, 4, **kw), (16, 16), 128, 4, 4),
    "lowrank-12x20": Case(lambda **kw: LowRank(12, 20, 3, **kw), (12, 20), 96, 3, 3),
    "lowrank-7x11-wide": Case(lambda **kw: LowRank(7, 11, 9, **kw), (7, 11), 162, 7, 9),
    "mlr-16": Case(lambda **kw: MLR(16, 16, (2, 2, 1), **kw), (16, 16), 160, 10, 10),
    "mlr-12x20": Case(lambda **kw: MLR(12, 20, (2, 1, 1), **kw), (12, 20), 128, 8, 8),
    "mlr-12x18-thirds": Case(lambda **kw: MLR(12, 18, (2, 1), blocks=(1, 3), **kw), (12, 18), 90, 5, 5),
    "mlr-7x11": Case(lambda **kw: MLR(7, 11, (3,), **kw), (7, 11), 54, 3, 3),
    "btt-16": Case(lambda **kw: BTT(16, 16, **kw), (16, 16), 128, 16, 16),
    "btt-12x20": Case(lambda **kw: BTT(12, 20, 2, **kw), (12, 20), 256, 12, 32),
    "btt-12x20-thin": Case(lambda **kw: BTT(12, 20, 2, ((6, 2), (2, 10)), **kw), (12, 20), 128, 8, 8),
    "btt-7x11": Case(lambda **kw: BTT(7, 11, **kw), (7, 11), 84, 7, 7),
    "monarch-16": Case(lambda **kw: Monarch(16, 16, 4, **kw), (16, 16), 128, 16, 16),
    "monarch-12x20": Case(lambda **kw: Monarch(12, 20, 2, **kw), (12, 20), 144, 12, 12),
    "monarch-7x11": Case(lambda **kw: Monarch(7, 11, 1, **kw), (7, 11), 84, 7, 7),
    "kronecker-16": Case(lambda **kw: Kronecker(((4, 4), (4, 4)), **kw), (16, 16), 32, 16, 16),
    "kronecker-12x20": Case(lambda **kw: Kronecker(((3, 2), (2, 2), (2, 5)), **kw), (12, 20), 20, 8, 8),
    "kronecker-20x12": Case(lambda **kw: Kronecker(((5, 2), (4, 6)), **kw), (20, 12), 34, 8, 8),
    "kronecker-7x11": Case(lambda **kw: Kronecker(((7, 11),), **kw), (7, 11), 77, 7, 7),
    "butterfly-2": Case(lambda **kw: Butterfly(2, **kw), (2, 2), 4, 2, 2),
    "butterfly-8": Case(lambda **kw: Butterfly(8, **kw), (8, 8), 48, 8, 8),
    "butterfly-16": Case(lambda **kw: Butterfly(16, **kw), (16, 16), 128, 16, 16),
    "mlbtc-12x20": Case(lambda **kw: MLBTC(MIXED, **kw), (12, 20), 32 + 64 + 84, 12, 1 + 8 + 6),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_heads = pytest.mark.parametrize("heads", [None, 1, 3], ids=["single", "heads1", "heads3"])
each_normalize = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(case: Case, heads: int | None = None, normalize: bool = False, seed: int = 0, **kw) -> Structure:
    """Return the member in float64, with large factors.

    Normalisation changes them where it is on.
    """
    structure = case.make(heads=heads, normalize=normalize, generator=seeded(seed), dtype=torch.float64, **kw)
    with torch.no_grad():
        for parameter in structure.parameters():
            parameter.mul_(1.7)
    return structure


def stack(structure: Structure, value: Tensor) -> Tensor:
    """`value` with a head axis in front, as `dense()` has it with heads."""
    return value.unsqueeze(0) if structure.heads is None else value


def relative_error(approximation: Tensor, target: Tensor) -> float:
    return ((approximation - target).norm() / target.norm()).item()
