"""Find the levels that tiles of queries share with keys.

Positions are those of one unpadded row. Shapes: N = batch · key heads, G = query heads per key
head; a tile's t queries are folded to (N, G·t, r), a run's keys are (N, n, r), scores are (N, G, t, n).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.ops.hierarchy import Hierarchy

QUERY_TILE = 128
KEY_RUN = 1024


def tile_size(hierarchy: Hierarchy) -> int:
    """Return the queries per tile: whole blocks of the coarsest level that fits, evenly inside the next coarser one."""
    finite = [size for size in hierarchy.block_sizes if size]
    base = next((size for size in finite if size <= QUERY_TILE), 1)
    coarser = min((size for size in finite if size > QUERY_TILE), default=0)
    most = QUERY_TILE // base
    even = next((count for count in range(most, most // 4, -1) if coarser % (base * count) == 0), most)
    return base * even


def key_runs(hierarchy: Hierarchy, tile: range, key_length: int, is_causal: bool) -> Iterator[range]:
    """Yield the keys that queries at positions `tile` may see, cut where the depth changes and after `KEY_RUN`."""
    end = min(tile.stop, key_length) if is_causal else key_length
    edges = {0, end}
    for size in hierarchy.block_sizes:
        if size:
            edges |= {min(tile.start // size * size, end), min((tile.stop - 1) // size * size + size, end)}
            if size < len(tile):  # finer levels lie within the tile: their edges are its own
                break
    for start, stop in itertools.pairwise(sorted(edges)):
        for at in range(start, stop, KEY_RUN):
            yield range(at, min(at + KEY_RUN, stop))


@dataclass(frozen=True)
class SharedLevels:
    """The prefix of dimensions that all pairs of a tile and a run share."""

    columns: slice

    def add_scores(self, score: Tensor, query: Tensor, key: Tensor) -> None:
        """`score += query · key` over the level's dimensions."""
        score.flatten(1, 2).baddbmm_(query[..., self.columns], key[..., self.columns].mT)

    def add_grads(self, score_grad: Tensor, query: Tensor, key: Tensor, query_grad: Tensor, key_grad: Tensor) -> None:
        """Add the gradients of the level's dimensions of queries and keys."""
        flat = score_grad.flatten(1, 2)
        query_grad[..., self.columns].baddbmm_(flat, key[..., self.columns])
        key_grad[..., self.columns].baddbmm_(flat.mT, query[..., self.columns])


@dataclass(frozen=True)
class MaskedLevel(SharedLevels):
    """A level that some pairs share: `mask (t, n)` is 1 for those and 0 for the others."""

    mask: Tensor

    def add_scores(self, score: Tensor, query: Tensor, key: Tensor) -> None:
        """`score += mask · (query · key)` over the level's dimensions."""
        score.addcmul_(torch.bmm(query[..., self.columns], key[..., self.columns].mT).view_as(score), self.mask)

    def add_grads(self, score_grad: Tensor, query: Tensor, key: Tensor, query_grad: Tensor, key_grad: Tensor) -> None:
        """Like `SharedLevels`, for the pairs in the mask."""
        super().add_grads(score_grad * self.mask, query, key, query_grad, key_grad)


@dataclass(frozen=True)
class BlockLevel:
    """A level where tile and run are the same `count` whole blocks: pairs in the diagonal blocks share it."""

    columns: slice
    count: int

    def add_scores(self, score: Tensor, query: Tensor, key: Tensor) -> None:
        """`score += query · key` in the diagonal blocks, one small product each."""
        group, length = score.shape[1:3]
        products = torch.bmm(self._fold_queries(query, group), self._fold_keys(key).mT)
        diagonal = self._diagonal(score)
        diagonal.add_(products.view(score.shape[0], self.count, group, length // self.count, -1))

    def add_grads(self, score_grad: Tensor, query: Tensor, key: Tensor, query_grad: Tensor, key_grad: Tensor) -> None:
        """Like `SharedLevels`, for the diagonal blocks."""
        (many, group, length, _), count = score_grad.shape, self.count
        blocks = self._diagonal(score_grad).reshape(many * count, group * length // count, length // count)
        queries = torch.bmm(blocks, self._fold_keys(key)).view(many, count, group, length // count, -1)
        query_grad[..., self.columns] += queries.transpose(1, 2).reshape(many, group * length, -1)
        key_grad[..., self.columns] += torch.bmm(blocks.mT, self._fold_queries(query, group)).view(many, length, -1)

    def _diagonal(self, score: Tensor) -> Tensor:
        """Return the diagonal blocks of `(N, G, t, t)`, a view `(N, count, G, size, size)`."""
        blocked = score.unflatten(3, (self.count, -1)).unflatten(2, (self.count, -1))
        return blocked.diagonal(0, 2, 4).permute(0, 4, 1, 2, 3)

    def _fold_queries(self, query: Tensor, group: int) -> Tensor:
        """Return `(N, G·t, r)` as `(N·count, G·size, r_l)`."""
        blocked = query[..., self.columns].unflatten(1, (group, self.count, -1)).transpose(1, 2)
        return blocked.reshape(query.shape[0] * self.count, -1, blocked.shape[-1])

    def _fold_keys(self, key: Tensor) -> Tensor:
        """Return `(N, t, r)` as `(N·count, size, r_l)`."""
        level = key[..., self.columns]
        return level.reshape(key.shape[0] * self.count, -1, level.shape[-1])


@dataclass(frozen=True)
class TilePair:
    """The levels that a tile of queries and a run of keys share.

    Scores are the sum of `levels`, times `gain`: one number, or `(t, n)` where depths differ. Pairs that are True in
    `hidden (t, n)` are removed by the causal mask.
    """

    levels: list[SharedLevels | BlockLevel]
    gain: float | Tensor
    hidden: Tensor | None

    def scores(self, query: Tensor, key: Tensor, group: int) -> Tensor:
        """Return the scores `(N, G, t, n)` of folded queries against keys, causal mask not yet applied."""
        score = query.new_zeros(query.shape[0], group, query.shape[1] // group, key.shape[1])
        for level in self.levels:
            level.add_scores(score, query, key)
        return self.apply_gain_(score)

    def add_grads(self, score_grad: Tensor, query: Tensor, key: Tensor, query_grad: Tensor, key_grad: Tensor) -> None:
        """Add the gradients of folded queries and keys; `score_grad (N, G, t, n)` is overwritten."""
        self.apply_gain_(score_grad)
        for level in self.levels:
            level.add_grads(score_grad, query, key, query_grad, key_grad)

    def apply_gain_(self, score: Tensor) -> Tensor:
        """Multiply by the gain, in place."""
        return score if isinstance(self.gain, float) and self.gain == 1.0 else score.mul_(self.gain)


def pair_tiles(hierarchy: Hierarchy, tile: range, run: range, is_causal: bool, like: Tensor) -> TilePair:
    """Return the levels that positions `tile` and `run` share; masks take the dtype and device of `like`."""
    i = torch.arange(tile.start, tile.stop, device=like.device)[:, None]
    j = torch.arange(run.start, run.stop, device=like.device)
    shared, partial, start = 0, list[SharedLevels | BlockLevel](), 0
    for size, stop in zip(hierarchy.block_sizes, hierarchy.prefix_ranks, strict=True):
        first = {tile.start // size, run.start // size} if size else {0}
        last = {(tile.stop - 1) // size, (run.stop - 1) // size} if size else {0}
        columns = slice(start, stop)
        if len(first | last) == 1:
            shared += 1
        elif not size or max(first) > min(last):
            break
        elif tile == run and tile.start % size == 0 and len(tile) % size == 0:
            partial.append(BlockLevel(columns, len(tile) // size))
        else:
            partial.append(MaskedLevel(columns, (i // size == j // size).to(like.dtype)))
        start = stop
    gain: float | Tensor = hierarchy.gains[shared - 1]
    if len(set(hierarchy.gains[shared - 1 : shared + len(partial)])) > 1:
        gain = torch.tensor(hierarchy.gains, dtype=like.dtype, device=like.device)[hierarchy.depth(i, j) - 1]
    hidden = j > i if is_causal and run.stop - 1 > tile.start else None
    return TilePair([SharedLevels(slice(0, hierarchy.prefix_ranks[shared - 1])), *partial], gain, hidden)
