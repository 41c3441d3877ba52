"""Compute MLR attention in PyTorch alone, tile by tile.

Memory is O(T); the backward pass computes scores again.

The keys of a query tile are cut into runs of one depth; far runs multiply only the prefix R_m of q and k. Levels finer
than a tile matter only for keys at the tile's own positions, where they are added as small block-diagonal products.

Shapes: N = batch · key heads, G = query heads per key head; a query tile is folded to (N, G·t, r), so that one batched
product serves all query heads that share a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.dropout import keep_mask
from structattn.ops.tiles import KEY_RUN, QUERY_TILE, TilePair, key_runs, pair_tiles, tile_size

# Most scores in memory at once, over all rows of a group. More do not fit the processor's cache; with fewer, the
# overhead of calls dominates.
_SCORES = 2**21


def ineligible(call: Call | None = None) -> str | None:
    """Return None: it serves every call, on every device."""
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, see `Backend`."""
    out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[3])
    lse = torch.full(call.query.shape[:3], torch.inf, dtype=call.lse_dtype, device=call.query.device)
    for group in _row_groups(call):
        _forward_group(group, group.query_view(out), group.query_view(lse))
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and bias, see `Backend`."""
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.query, call.key, call.value)]
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        bias_grad = torch.zeros(call.attn_bias.shape, dtype=call.lse_dtype, device=call.query.device)
    delta = (grad_out.to(call.lse_dtype) * out).sum(-1)
    for group in _row_groups(call):
        rows = tuple(group.query_view(tensor) for tensor in (grad_out, lse, delta))
        key_grad, value_grad = _backward_group(group, rows, group.query_view(grads[0]), bias_grad)
        grads[1][group.rows, :, group.keys] = key_grad
        grads[2][group.rows, :, group.keys] = value_grad
    if bias_grad is not None and call.attn_bias is not None:
        bias_grad = bias_grad.to(call.attn_bias.dtype)
    return grads[0], grads[1], grads[2], bias_grad


@dataclass(frozen=True)
class _RowGroup:
    """Neighbouring rows with the same range of valid keys.

    Sliced out of the whole, they are a call without padding. Positions count from the first valid key: the first query
    of the group stands at `offset`, its first key at 0.
    """

    call: Call
    rows: slice
    queries: slice
    keys: slice
    offset: int

    @property
    def heads_per_key(self) -> int:
        """Number of query heads that share one key head, G."""
        return self.call.query.shape[1] // self.call.key.shape[1]

    def query_view(self, tensor: Tensor) -> Tensor:
        """Return the group's view of `(B, Hq, Tq, …)`."""
        return tensor[self.rows, :, self.queries]

    def fold_keys(self, tensor: Tensor) -> Tensor:
        """Return the group's valid keys or values, `(N, n, w)`, in the accumulation dtype."""
        return tensor[self.rows, :, self.keys].to(self.call.lse_dtype).flatten(0, 1)

    def fold_tile(self, tensor: Tensor, tile: range) -> Tensor:
        """Return a tile of `query_view` as `(N, G·t, w)` in the accumulation dtype."""
        folded = tensor[:, :, tile.start - self.offset : tile.stop - self.offset].to(self.call.lse_dtype)
        return folded.reshape(
            len(folded) * folded.shape[1] // self.heads_per_key, self.heads_per_key * len(tile), folded.shape[3]
        )

    def tile_pairs(self) -> Iterator[tuple[range, list[tuple[slice, TilePair]]]]:
        """Yield tiles of queries, cut at multiples of their size, with runs."""
        size, end = tile_size(self.call.hierarchy), self.offset + self.queries.stop - self.queries.start
        key_length = self.keys.stop - self.keys.start
        position = self.offset
        while position < end:
            tile = range(position, min(position // size * size + size, end))
            yield (
                tile,
                [
                    (slice(run.start, run.stop), self._pair(tile, run))
                    for run in key_runs(self.call.hierarchy, tile, key_length, self.call.is_causal)
                ],
            )
            position = tile.stop

    def _pair(self, tile: range, run: range) -> TilePair:
        like = torch.empty(0, dtype=self.call.lse_dtype, device=self.call.query.device)
        return pair_tiles(self.call.hierarchy, self.call.value_widths, tile, run, self.call.is_causal, like)

    def scores(self, tile: range, run: slice, pair: TilePair, query: Tensor, key: Tensor) -> Tensor:
        """Return biased scores `(N, G·t, n)` of a scaled, folded tile, `-inf` where hidden."""
        score = pair.scores(query, key[:, run], self.heads_per_key)
        if self.call.attn_bias is not None:
            self.per_head(score).add_(self.bias_at(self.call.attn_bias, tile, run))
        if pair.hidden is not None:
            score.masked_fill_(pair.hidden, -torch.inf)
        return score.flatten(1, 2)

    def unfold(self, matrix: Tensor) -> Tensor:
        """Return a view of `(N, G·t, n)` as `(N, G, t, n)`."""
        return matrix.unflatten(1, (self.heads_per_key, -1))

    def per_head(self, score: Tensor) -> Tensor:
        """Return a view of `(N, G, t, n)` as `(rows, Hq, t, n)`."""
        return score.view(-1, self.call.query.shape[1], *score.shape[2:])

    def bias_at(self, bias: Tensor, tile: range, run: slice) -> Tensor:
        """Return a tile pair's slice of a bias; size 1 stays whole."""
        query, key = self.queries.start - self.offset, self.keys.start
        queries, keys = slice(query + tile.start, query + tile.stop), slice(key + run.start, key + run.stop)
        wanted = (self.rows, slice(None), queries, keys)
        return bias[tuple(slice(None) if size == 1 else cut for size, cut in zip(bias.shape, wanted, strict=True))]

    def keep(self, tile: range, run: slice) -> Tensor | None:
        """Return dropout's factors on probabilities `(N, G·t, n)`; None without dropout."""
        call = self.call
        if call.seed is None:
            return None
        heads, device = call.query.shape[1], call.query.device
        rows_and_heads = torch.arange(self.rows.start * heads, self.rows.stop * heads, device=device)
        rows_and_heads = rows_and_heads.view(-1, self.heads_per_key, 1, 1)
        queries = torch.arange(tile.start, tile.stop, device=device)[:, None] + self.queries.start - self.offset
        keys = torch.arange(run.start, run.stop, device=device) + self.keys.start
        kept = keep_mask(call.seed, rows_and_heads, queries, keys, call.dropout_p)
        return (kept.to(call.lse_dtype) / (1 - call.dropout_p)).flatten(1, 2)


def _row_groups(call: Call) -> Iterator[_RowGroup]:
    """Yield groups of rows with queries and keys, at most `_SCORES` large."""
    (batch, heads, query_length, _), key_length = call.query.shape, call.key.shape[2]
    starts = [0] * batch if call.key_start is None else call.key_start.tolist()
    ends = [key_length] * batch if call.key_end is None else call.key_end.tolist()
    scores_per_row = heads * min(QUERY_TILE, query_length) * min(KEY_RUN, key_length)
    most = max(1, _SCORES // max(1, scores_per_row))
    row = 0
    while row < batch:
        start, end = starts[row], ends[row]
        stop = row + 1
        while stop < min(batch, row + most) and (starts[stop], ends[stop]) == (start, end):
            stop += 1
        first = max(start - call.query_offset, 0)
        if first < query_length and start < end:
            offset = call.query_offset + first - start
            yield _RowGroup(call, slice(row, stop), slice(first, query_length), slice(start, end), offset)
        row = stop


def _forward_group(group: _RowGroup, out: Tensor, lse: Tensor) -> None:
    """Fill the group's output `(rows, Hq, Tq, dv)` and log-sum-exp `(rows, Hq, Tq)`."""
    call = group.call
    key, value, queries = group.fold_keys(call.key), group.fold_keys(call.value), group.query_view(call.query)
    for tile, runs in group.tile_pairs():
        query = group.fold_tile(queries, tile) * call.scale
        total_out = query.new_zeros(*query.shape[:2], value.shape[2])
        top = query.new_full((*query.shape[:2], 1), -torch.inf)
        total = query.new_zeros(top.shape)
        for run, pair in runs:
            score = group.scores(tile, run, pair, query, key)
            new_top = torch.maximum(top, score.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a row without visible keys so far
            probability = score.sub_(base).exp_()
            decay = torch.exp(top - base)
            total.mul_(decay).add_(probability.sum(-1, keepdim=True))
            keep = group.keep(tile, run)
            if keep is not None:
                probability.mul_(keep)
            pair.mix(group.unfold(probability), value[:, run], total_out.mul_(decay))
            top = new_top
        at = slice(tile.start - group.offset, tile.stop - group.offset)
        empty = total == 0
        out[:, :, at] = (total_out / total.masked_fill(empty, 1.0)).view_as(out[:, :, at])
        lse[:, :, at] = (top + total.log()).masked_fill(empty, torch.inf).view_as(lse[:, :, at])


def _backward_group(
    group: _RowGroup, rows: tuple[Tensor, ...], query_grad: Tensor, bias_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the group's keys and values.

    They are `(rows, Hkv, n, r)` and `(rows, Hkv, n, dv)`. Fill the group's `query_grad` and add to the whole
    `bias_grad`. `rows` are the group's views `(rows, Hq, Tq, …)` of the output's gradient, the log-sum-exp and delta.
    """
    call, (grad_out, lse, delta) = group.call, rows
    key, value, queries = group.fold_keys(call.key), group.fold_keys(call.value), group.query_view(call.query)
    key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
    for tile, runs in group.tile_pairs():
        query = group.fold_tile(queries, tile) * call.scale
        out_grad, tile_lse, tile_delta = (
            group.fold_tile(x, tile) for x in (grad_out, lse[..., None], delta[..., None])
        )
        tile_grad = torch.zeros_like(query)
        for run, pair in runs:
            probability = group.scores(tile, run, pair, query, key).sub_(tile_lse).exp_()
            score_grad = pair.probability_grads(out_grad, value[:, run], group.heads_per_key).flatten(1, 2)
            keep = group.keep(tile, run)
            if keep is not None:
                score_grad.mul_(keep)
            kept = probability if keep is None else probability * keep
            pair.add_value_grads(group.unfold(kept), out_grad, value_grad[:, run])
            score_grad = group.unfold(score_grad.sub_(tile_delta).mul_(probability))
            if bias_grad is not None:
                target = group.bias_at(bias_grad, tile, run)
                target.add_(group.per_head(score_grad).sum_to_size(target.shape))
            pair.add_grads(score_grad, query, key[:, run], tile_grad, key_grad[:, run])
        at = slice(tile.start - group.offset, tile.stop - group.offset)
        query_grad[:, :, at] = (tile_grad * call.scale).view_as(query_grad[:, :, at])
    heads = call.key.shape[1]
    count = len(key_grad) // heads
    return key_grad.unflatten(0, (count, heads)), value_grad.unflatten(0, (count, heads))
