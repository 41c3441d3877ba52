"""Multiply tiles of queries by runs of keys in shared levels.

A tile is up to `QUERY_TILE` consecutive queries. A run is up to `KEY_RUN` consecutive keys, at most as many as lie
between two changes of depth. Positions are those of one unpadded row.

Shapes: N = batch · key heads, G = query heads per key head; a tile's t queries are folded to (N, G·t, r), a run's keys
are (N, n, r), scores are (N, G, t, n).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.ops.hierarchy import Hierarchy

QUERY_TILE = 128
"""Most queries in a tile."""

KEY_RUN = 1024
"""Most keys in a run; it bounds the memory of the scores of a tile."""


def tile_size(hierarchy: Hierarchy) -> int:
    """Return the queries per tile.

    By block they are whole blocks of the coarsest level that fits: as many as divide the next coarser block, or as many
    as fit if none do.
    """
    if hierarchy.by_window:
        return QUERY_TILE
    finite = [size for size in hierarchy.sizes if size]
    base = next((size for size in finite if size <= QUERY_TILE), 1)
    coarser = min((size for size in finite if size > QUERY_TILE), default=0)
    most = QUERY_TILE // base
    even = next((count for count in range(most, most // 4, -1) if coarser % (base * count) == 0), most)
    return base * even


def key_runs(hierarchy: Hierarchy, tile: range, key_length: int, is_causal: bool) -> Iterator[range]:
    """Yield runs of at most `KEY_RUN` visible keys, cut where depth changes."""
    first, stop = _reached_by_some(hierarchy, 0, tile)
    first, stop = max(first, 0), min(stop, key_length, tile.stop if is_causal else key_length)
    edges = {first, stop}
    for level, size in enumerate(hierarchy.sizes):
        if size:
            edges.update(_reached_by_some(hierarchy, level, tile))
            if hierarchy.by_window:
                start, end = _reached_by_all(hierarchy, level, tile)
                edges.update((start, end) if start < end else ())
            elif size < len(tile):
                break  # finer blocks lie within the tile: their edges are its own
    for start, end in itertools.pairwise(sorted(edge for edge in edges if first <= edge <= stop)):
        for at in range(start, end, KEY_RUN):
            yield range(at, min(at + KEY_RUN, end))


def _reached_by_some(hierarchy: Hierarchy, level: int, tile: range) -> tuple[int, int]:
    """Return start and stop of what any position of the tile reaches."""
    return hierarchy.span(level, tile.start)[0], hierarchy.span(level, tile.stop - 1)[1]


def _reached_by_all(hierarchy: Hierarchy, level: int, tile: range) -> tuple[int, int]:
    """Return start and stop of what all positions reach; they may cross."""
    return hierarchy.span(level, tile.stop - 1)[0], hierarchy.span(level, tile.start)[1]


@dataclass(frozen=True)
class LevelProducts:
    """Products of a tile's rows (`left`) and a run's rows (`right`).

    They are over the columns of levels that all pairs share. For scores the rows are queries and keys; for gradients of
    probabilities, output gradients and values. `matrix (N, G, t, n)` has one number per query and key.

    Args:
        columns: the dimensions.
    """

    columns: slice

    def add_to_matrix(self, matrix: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `left · right` over the columns to `matrix`."""
        matrix.flatten(1, 2).baddbmm_(left[..., self.columns], right[..., self.columns].mT)

    def add_to_left(self, matrix: Tensor, right: Tensor, total: Tensor) -> None:
        """Add `matrix · right` to `total` in the columns."""
        total[..., self.columns].baddbmm_(matrix.flatten(1, 2), right[..., self.columns])

    def add_to_right(self, matrix: Tensor, left: Tensor, total: Tensor) -> None:
        """Add `matrixᵀ · left` to `total` in the columns."""
        total[..., self.columns].baddbmm_(matrix.flatten(1, 2).mT, left[..., self.columns])


@dataclass(frozen=True)
class MaskedProducts(LevelProducts):
    """Products of a level that some pairs share.

    Args:
        columns: the dimensions.
        mask: `(t, n)`, 1 for the pairs that share them and 0 for the others.
    """

    mask: Tensor

    def add_to_matrix(self, matrix: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `mask · (left · right)` over the columns to `matrix`."""
        matrix.addcmul_(torch.bmm(left[..., self.columns], right[..., self.columns].mT).view_as(matrix), self.mask)

    def add_to_left(self, matrix: Tensor, right: Tensor, total: Tensor) -> None:
        """Add `(matrix · mask) · right` to `total` in the columns."""
        super().add_to_left(matrix * self.mask, right, total)

    def add_to_right(self, matrix: Tensor, left: Tensor, total: Tensor) -> None:
        """Add `(matrix · mask)ᵀ · left` to `total` in the columns."""
        super().add_to_right(matrix * self.mask, left, total)


@dataclass(frozen=True)
class BlockDiagonalProducts(LevelProducts):
    """Products of a level by block, in diagonal blocks of the matrix.

    Tile and run are the same whole blocks.

    Args:
        columns: the dimensions.
        count: number of blocks.
    """

    count: int

    def add_to_matrix(self, matrix: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `left · right` to the diagonal blocks, one small product each."""
        group, length = matrix.shape[1:3]
        products = torch.bmm(self._fold_left(left, group), self._fold_right(right).mT)
        diagonal = self._diagonal(matrix)
        diagonal.add_(products.view(matrix.shape[0], self.count, group, length // self.count, -1))

    def add_to_left(self, matrix: Tensor, right: Tensor, total: Tensor) -> None:
        """Add the diagonal blocks times `right` to `total` in the columns."""
        many, group, length, _ = matrix.shape
        added = torch.bmm(self._fold_matrix(matrix), self._fold_right(right))
        added = added.view(many, self.count, group, length // self.count, -1).transpose(1, 2)
        total[..., self.columns] += added.reshape(many, group * length, -1)

    def add_to_right(self, matrix: Tensor, left: Tensor, total: Tensor) -> None:
        """Add the transposed diagonal blocks times `left` to `total` in the columns."""
        many, group, length, _ = matrix.shape
        added = torch.bmm(self._fold_matrix(matrix).mT, self._fold_left(left, group))
        total[..., self.columns] += added.view(many, length, -1)

    def _diagonal(self, matrix: Tensor) -> Tensor:
        """Return the diagonal blocks of `(N, G, t, t)`, a view `(N, count, G, size, size)`."""
        blocked = matrix.unflatten(3, (self.count, -1)).unflatten(2, (self.count, -1))
        return blocked.diagonal(0, 2, 4).permute(0, 4, 1, 2, 3)

    def _fold_matrix(self, matrix: Tensor) -> Tensor:
        """Return the diagonal blocks of `(N, G, t, t)` as `(N·count, G·size, size)`."""
        (many, group, length, _), count = matrix.shape, self.count
        return self._diagonal(matrix).reshape(many * count, group * length // count, length // count)

    def _fold_left(self, left: Tensor, group: int) -> Tensor:
        """Return `(N, G·t, r)` as `(N·count, G·size, width)`."""
        blocked = left[..., self.columns].unflatten(1, (group, self.count, -1)).transpose(1, 2)
        return blocked.reshape(left.shape[0] * self.count, -1, blocked.shape[-1])

    def _fold_right(self, right: Tensor) -> Tensor:
        """Return `(N, t, r)` as `(N·count, size, width)`."""
        level = right[..., self.columns]
        return level.reshape(right.shape[0] * self.count, -1, level.shape[-1])


@dataclass(frozen=True)
class TilePair:
    """Products that a tile of queries shares with a run of keys.

    Args:
        score_products: products of queries and keys. Scores are their sum times `gain`.
        value_products: products of probabilities and values.
        gain: one number, or `(t, n)` where depths differ.
        hidden: `(t, n)`, True for invisible pairs; None without any.
    """

    score_products: Sequence[LevelProducts]
    value_products: Sequence[LevelProducts]
    gain: float | Tensor
    hidden: Tensor | None

    def scores(self, query: Tensor, key: Tensor, group: int) -> Tensor:
        """Return the unmasked scores `(N, G, t, n)` of folded queries against keys."""
        score = query.new_zeros(query.shape[0], group, query.shape[1] // group, key.shape[1])
        for products in self.score_products:
            products.add_to_matrix(score, query, key)
        return self.apply_gain_(score)

    def add_grads(self, score_grad: Tensor, query: Tensor, key: Tensor, query_grad: Tensor, key_grad: Tensor) -> None:
        """Add the gradients of folded queries and keys; overwrite `score_grad (N, G, t, n)`."""
        self.apply_gain_(score_grad)
        for products in self.score_products:
            products.add_to_left(score_grad, key, query_grad)
            products.add_to_right(score_grad, query, key_grad)

    def mix(self, probability: Tensor, value: Tensor, out: Tensor) -> None:
        """Add values, weighted by probabilities `(N, G, t, n)`, to the folded output."""
        for products in self.value_products:
            products.add_to_left(probability, value, out)

    def probability_grads(self, out_grad: Tensor, value: Tensor, group: int) -> Tensor:
        """Return the gradients `(N, G, t, n)` of probabilities."""
        grads = out_grad.new_zeros(out_grad.shape[0], group, out_grad.shape[1] // group, value.shape[1])
        for products in self.value_products:
            products.add_to_matrix(grads, out_grad, value)
        return grads

    def add_value_grads(self, probability: Tensor, out_grad: Tensor, value_grad: Tensor) -> None:
        """Add the gradients of values."""
        for products in self.value_products:
            products.add_to_right(probability, out_grad, value_grad)

    def apply_gain_(self, score: Tensor) -> Tensor:
        """Multiply by the gain, in place."""
        return score if isinstance(self.gain, float) and self.gain == 1.0 else score.mul_(self.gain)


def pair_tiles(
    hierarchy: Hierarchy, value_widths: Sequence[int], tile: range, run: range, is_causal: bool, like: Tensor
) -> TilePair:
    """Return the products that positions `tile` and `run` share.

    Masks take the dtype and device of `like`.
    """
    i = torch.arange(tile.start, tile.stop, device=like.device)[:, None]
    j = torch.arange(run.start, run.stop, device=like.device)
    whole = itertools.takewhile(lambda level: _reaches_all(hierarchy, level, tile, run), range(hierarchy.levels))
    shared = len(list(whole))
    hidden = j > i if is_causal and run.stop - 1 > tile.start else None
    if shared == 0:  # a window hides the pairs that level 1 does not reach, so that the others share it
        outside = ~hierarchy.reaches(0, i, j)
        hidden, shared = outside if hidden is None else hidden | outside, 1
    finer = range(shared, hierarchy.levels)
    partial = list(itertools.takewhile(lambda level: _reaches_some(hierarchy, level, tile, run), finer))
    gain: float | Tensor = hierarchy.gains[shared - 1]
    if len(set(hierarchy.gains[shared - 1 : shared + len(partial)])) > 1:
        gains = torch.tensor(hierarchy.gains, dtype=like.dtype, device=like.device)
        gain = gains[hierarchy.depth(i, j).clamp(min=1) - 1]
    counts = {level: _aligned_blocks(hierarchy, level, tile, run) for level in partial}
    masks = {level: hierarchy.reaches(level, i, j).to(like.dtype) for level in partial if not counts[level]}

    def products_over(widths: Sequence[int]) -> list[LevelProducts]:
        edges = [0, *itertools.accumulate(widths)]
        products: list[LevelProducts] = [LevelProducts(slice(0, edges[shared]))] if edges[shared] else []
        for level in (level for level in partial if widths[level]):
            columns, count = slice(edges[level], edges[level + 1]), counts[level]
            products.append(BlockDiagonalProducts(columns, count) if count else MaskedProducts(columns, masks[level]))
        return products

    return TilePair(products_over(hierarchy.ranks), products_over(value_widths), gain, hidden)


def _aligned_blocks(hierarchy: Hierarchy, level: int, tile: range, run: range) -> int:
    """Return the blocks in a tile that equals its run, else 0."""
    size = hierarchy.sizes[level] or 0
    aligned = not hierarchy.by_window and tile == run and tile.start % size == 0 and len(tile) % size == 0
    return len(tile) // size if aligned else 0


def _reaches_all(hierarchy: Hierarchy, level: int, tile: range, run: range) -> bool:
    """Return True if a level reaches all pairs of tile and run."""
    start, stop = _reached_by_all(hierarchy, level, tile)
    return bool(start <= run.start and run.stop <= stop)


def _reaches_some(hierarchy: Hierarchy, level: int, tile: range, run: range) -> bool:
    """Return True if a level reaches some pair of tile and run."""
    start, stop = _reached_by_some(hierarchy, level, tile)
    return bool(start < run.stop and run.start < stop)
