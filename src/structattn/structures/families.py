"""Define LowRank, MLR, BTT and Monarch as MLBTC."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from structattn.checks import positive_int, positive_ints
from structattn.structures.contraction import Level
from structattn.structures.mlbtc import MLBTC

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.structures.base import StructureOptions


class LowRank(MLBTC):
    """`M = L Rᵀ`: the score of standard attention.

    `L` is `(dim_out, rank)` and `R` is `(dim_in, rank)`. Parameters per matrix: `r(D_out + D_in)`; rank bound
    `min(D_out, D_in, r)`; feature width `r`. The factors are `left_1 ([H,] 1, dim_out, rank)` and `right_1 ([H,] 1,
    dim_in, rank)`. `project_` gives the truncated SVD.

    Args:
        dim_out: Rows.
        dim_in: Columns.
        rank: Rank of each matrix.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: a dim or the rank is not a positive integer.
    """

    def __init__(
        self,
        dim_out: int,
        dim_in: int,
        rank: int,
        **options: Unpack[StructureOptions],
    ) -> None:
        positive_int("rank", rank)
        super().__init__([Level.low_rank(dim_out, dim_in, rank)], **options)
        self.rank = rank

    def _shape_repr(self) -> str:
        return f"{self.dim_out}, {self.dim_in}, rank={self.rank}"


class MLR(MLBTC):
    r"""`M = Σ_l ⊕_{k=1..p_l} L_{l,k} R_{l,k}ᵀ`: a Multi-Level Low Rank matrix.

    Level `l` is block diagonal with `p_l` blocks of rank `r_l`; the blocks of each level split those of the level
    before. Parameters per matrix: `(D_out + D_in)·Σ r_l`; rank bound `min(D_out, D_in, Σ p_l r_l)`; level `l` owns
    `p_l r_l` features. The factors of level `l` are `left_l ([H,] p_l, dim_out/p_l, r_l)` and
    `right_l ([H,] p_l, dim_in/p_l, r_l)`. Source: arXiv 2509.07963.

    Args:
        dim_out: Rows.
        dim_in: Columns.
        ranks: Rank of the blocks of each level, global level first.
        blocks: Number of blocks of each level: starts at 1, increases, each divides the next and both dims.
            None means 1, 2, 4, …. For partitions that do not nest there is `MLBTC`.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `ranks` is empty or not of positive integers, or `blocks` differs in length, does not
            start at 1, nest, increase or divide both dims.
    """

    def __init__(
        self,
        dim_out: int,
        dim_in: int,
        ranks: Sequence[int],
        blocks: Sequence[int] | None = None,
        **options: Unpack[StructureOptions],
    ) -> None:
        positive_int("dim_out", dim_out)
        positive_int("dim_in", dim_in)
        ranks = positive_ints("ranks", ranks)
        blocks = tuple(2**level for level in range(len(ranks))) if blocks is None else blocks
        blocks = self._check_blocks(positive_ints("blocks", blocks), len(ranks), dim_out, dim_in)
        super().__init__([Level.low_rank(dim_out, dim_in, r, p) for r, p in zip(ranks, blocks, strict=True)], **options)
        self.ranks = ranks
        self.blocks = blocks

    @staticmethod
    def _check_blocks(blocks: tuple[int, ...], levels: int, dim_out: int, dim_in: int) -> tuple[int, ...]:
        if len(blocks) != levels:
            raise ValueError(f"blocks must have one entry for each of the {levels} ranks, got {blocks}")
        if blocks[0] != 1:
            raise ValueError(f"blocks must start with the global level, 1, got {blocks}")
        for coarse, fine in itertools.pairwise(blocks):
            if fine <= coarse or fine % coarse:
                raise ValueError(
                    f"blocks must increase, each a multiple of the one before, got {blocks}; "
                    "MLBTC takes levels that do not nest"
                )
        for number, p in enumerate(blocks, start=1):
            if dim_out % p or dim_in % p:
                raise ValueError(f"blocks must divide dim_out={dim_out} and dim_in={dim_in}, got {p} at level {number}")
        return blocks

    def _shape_repr(self) -> str:
        return f"{self.dim_out}, {self.dim_in}, ranks={self.ranks}, blocks={self.blocks}"


class BTT(MLBTC):
    r"""`M = P_L (⊕_{k'=1..b} L_{k'}) P_R (⊕_{k=1..c} R_kᵀ)`: a Block Tensor Train.

    `dim_out = a·b` and `dim_in = c·d`; the tile of rows `i_b` and columns `i_c`, `a x d`, has rank `s = rank`.
    Parameters per matrix: `c·d·b·s + b·a·c·s`, `2 D^{3/2} s` where `a = b = c = d = √D`; rank bound
    `min(D_out, D_in, b·c·s)`; feature width `b·c·s`. The factors are `left_1 ([H,] b, a, c·s)` and
    `right_1 ([H,] c, d, b·s)`. `project_` truncates the SVD of every tile, which is optimal.
    Source: arXiv 2509.07963.

    Args:
        dim_out: Rows.
        dim_in: Columns.
        rank: Rank `s` of every tile.
        factors: `((a, b), (c, d))`. None takes for `b` the smallest divisor of `dim_out` not below its root, and
            for `d` that of `dim_in`. The paper's code takes the smallest divisor above the root.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `factors` is not two pairs of positive integers with products `dim_out` and `dim_in`,
            or a dim or the rank is not a positive integer.
    """

    def __init__(
        self,
        dim_out: int,
        dim_in: int,
        rank: int = 1,
        factors: tuple[tuple[int, int], tuple[int, int]] | None = None,
        **options: Unpack[StructureOptions],
    ) -> None:
        b, d = root_divisor(positive_int("dim_out", dim_out)), root_divisor(positive_int("dim_in", dim_in))
        positive_int("rank", rank)
        if factors is None:
            factors = ((dim_out // b, b), (dim_in // d, d))
        (a, b), (c, d) = factors = self._check_factors(factors, dim_out, dim_in)
        super().__init__([Level(a, b, c, d, rank)], **options)
        self.rank = rank
        self.factors = factors

    @staticmethod
    def _check_factors(
        factors: tuple[tuple[int, int], tuple[int, int]], dim_out: int, dim_in: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        shape = "((a, b), (c, d)) with a·b = dim_out and c·d = dim_in"
        if not isinstance(factors, Sequence):
            raise TypeError(f"factors must be {shape}, got {factors!r}")
        pairs = [positive_ints(f"factors[{side}]", pair) for side, pair in enumerate(factors)]
        if [len(pair) for pair in pairs] != [2, 2]:
            raise ValueError(f"factors must be {shape}, got {factors!r}")
        (a, b), (c, d) = pairs
        if (a * b, c * d) != (dim_out, dim_in):
            raise ValueError(
                f"factors must be {shape}: {dim_out} and {dim_in}, got {a}·{b} = {a * b} and {c}·{d} = {c * d}"
            )
        return ((a, b), (c, d))

    def _shape_repr(self) -> str:
        return f"{self.dim_out}, {self.dim_in}, rank={self.rank}, factors={self.factors}"


class Monarch(MLBTC):
    r"""`M = P L Pᵀ R`: a Monarch matrix, two block-diagonal factors with a transposition between.

    `R` is `dim_out x dim_in` with `blocks` diagonal blocks, `L` is square with `dim_out/blocks` blocks of
    `blocks x blocks`, and `P` transposes the grid `(blocks, dim_out/blocks)`. For `dim_out = dim_in = n` this is the
    class `M^(n/blocks, n)` of Dao et al. 2022 (arXiv 2204.00595), for `blocks = √n` the one of their experiments;
    and a BTT of rank 1 with `a = c = blocks`. Parameters per matrix: `D_out·D_in/blocks + D_out·blocks`; rank bound
    `min(D_out, D_in)`; feature width `D_out`. The factors are `left_1 ([H,] dim_out/blocks, blocks, blocks)` and
    `right_1 ([H,] blocks, dim_in/blocks, dim_out/blocks)`. `project_` is the optimum, a rank-one SVD of every tile.

    Args:
        dim_out: Rows.
        dim_in: Columns.
        blocks: Number of diagonal blocks of `R`; divides both dims.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `blocks` does not divide both dims, or one of them is not a positive integer.
    """

    def __init__(
        self,
        dim_out: int,
        dim_in: int,
        blocks: int,
        **options: Unpack[StructureOptions],
    ) -> None:
        for name, dim in (("dim_out", dim_out), ("dim_in", dim_in)):
            if positive_int(name, dim) % positive_int("blocks", blocks):
                raise ValueError(f"blocks must divide {name}={dim}, got {blocks}")
        super().__init__([Level(blocks, dim_out // blocks, blocks, dim_in // blocks)], **options)
        self.blocks = blocks

    def _shape_repr(self) -> str:
        return f"{self.dim_out}, {self.dim_in}, blocks={self.blocks}"


def root_divisor(n: int) -> int:
    """Return the smallest divisor of `n` that is not below `√n`."""
    return n // next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)


def divisor_above_root(n: int) -> int:
    """Return the smallest divisor of `n` above `√n`; 1 for 1."""
    return next((k for k in range(math.isqrt(n) + 1, n + 1) if n % k == 0), n)
