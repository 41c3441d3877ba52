"""MLR attention in PyTorch alone, tile by tile: memory O(T), scores recomputed in the backward pass.

A query tile meets the keys in runs of one depth: far runs multiply only the prefix R_m of q and k. Levels finer than a
tile occur in the run it shares with itself alone, and are added there as small block-diagonal products.

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
from structattn.ops.tiles import KEY_RUN, QUERY_TILE, Meeting, key_runs, meet, tile_size

# Scores in flight, over all rows of a part. Larger tiles leave the cache, smaller ones are ruled by call overhead.
_SCORES = 2**21


def ineligible(call: Call | None = None) -> str | None:
    """None: it serves every call, on every device."""
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, Tq, dv)` and log-sum-exp `(B, Hq, Tq)`, see `Backend`."""
    out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[3])
    lse = torch.full(call.query.shape[:3], torch.inf, dtype=call.lse_dtype, device=call.query.device)
    for part in _parts(call):
        _forward_part(part, part.of_queries(out), part.of_queries(lse))
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, see `Backend`."""
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.query, call.key, call.value)]
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        bias_grad = torch.zeros(call.attn_bias.shape, dtype=call.lse_dtype, device=call.query.device)
    delta = (grad_out.to(call.lse_dtype) * out).sum(-1)
    for part in _parts(call):
        rows = tuple(part.of_queries(tensor) for tensor in (grad_out, lse, delta))
        key_grad, value_grad = _backward_part(part, rows, part.of_queries(grads[0]), bias_grad)
        grads[1][part.rows, :, part.keys] = key_grad
        grads[2][part.rows, :, part.keys] = value_grad
    if bias_grad is not None and call.attn_bias is not None:
        bias_grad = bias_grad.to(call.attn_bias.dtype)
    return grads[0], grads[1], grads[2], bias_grad


@dataclass(frozen=True)
class _Part:
    """Rows that share one range of valid keys, with the padding cut away: what remains is a call without padding.

    Positions count from the first valid key: query index 0 of the part stands at `offset`, key index 0 at 0.
    """

    call: Call
    rows: slice
    queries: slice
    keys: slice
    offset: int

    @property
    def group(self) -> int:
        """G, the query heads that share one key head."""
        return self.call.query.shape[1] // self.call.key.shape[1]

    def of_queries(self, tensor: Tensor) -> Tensor:
        """The part's view of `(B, Hq, Tq, …)`."""
        return tensor[self.rows, :, self.queries]

    def fold_keys(self, tensor: Tensor) -> Tensor:
        """Valid keys or values of the part as `(N, n, w)` in the accumulation dtype."""
        return tensor[self.rows, :, self.keys].to(self.call.lse_dtype).flatten(0, 1)

    def fold_tile(self, tensor: Tensor, tile: range) -> Tensor:
        """A tile of the part's view of `(B, Hq, Tq, w)` as `(N, G·t, w)` in the accumulation dtype."""
        folded = tensor[:, :, tile.start - self.offset : tile.stop - self.offset].to(self.call.lse_dtype)
        return folded.reshape(len(folded) * folded.shape[1] // self.group, self.group * len(tile), folded.shape[3])

    def meetings(self) -> Iterator[tuple[range, list[tuple[slice, Meeting]]]]:
        """Tiles of queries, in positions, with edges at multiples of the tile size, and the runs of keys each meets."""
        size, end = tile_size(self.call.hierarchy), self.offset + self.queries.stop - self.queries.start
        key_length = self.keys.stop - self.keys.start
        position = self.offset
        while position < end:
            tile = range(position, min(position // size * size + size, end))
            yield (
                tile,
                [
                    (slice(run.start, run.stop), self._meet(tile, run))
                    for run in key_runs(self.call.hierarchy, tile, key_length, self.call.is_causal)
                ],
            )
            position = tile.stop

    def _meet(self, tile: range, run: range) -> Meeting:
        like = torch.empty(0, dtype=self.call.lse_dtype, device=self.call.query.device)
        return meet(self.call.hierarchy, tile, run, self.call.is_causal, like)

    def scores(self, tile: range, run: slice, meeting: Meeting, query: Tensor, key: Tensor) -> Tensor:
        """Scores `(N, G·t, n)` of a scaled, folded tile, with bias, `-inf` where hidden."""
        score = meeting.scores(query, key[:, run], self.group)
        if self.call.attn_bias is not None:
            self.per_head(score).add_(self.bias_at(self.call.attn_bias, tile, run))
        if meeting.hidden is not None:
            score.masked_fill_(meeting.hidden, -torch.inf)
        return score.flatten(1, 2)

    def per_head(self, score: Tensor) -> Tensor:
        """`(N, G, t, n)` as `(rows, Hq, t, n)`, a view."""
        return score.view(-1, self.call.query.shape[1], *score.shape[2:])

    def bias_at(self, bias: Tensor, tile: range, run: slice) -> Tensor:
        """The part of a bias-shaped tensor that a tile and a run read, broadcast axes left as they are."""
        query, key = self.queries.start - self.offset, self.keys.start
        queries, keys = slice(query + tile.start, query + tile.stop), slice(key + run.start, key + run.stop)
        wanted = (self.rows, slice(None), queries, keys)
        return bias[tuple(slice(None) if size == 1 else cut for size, cut in zip(bias.shape, wanted, strict=True))]

    def keep(self, tile: range, run: slice) -> Tensor | None:
        """Dropout's factor on the probabilities `(N, G·t, n)`: 0 or `1/(1 - p)`; None without dropout."""
        call = self.call
        if call.seed is None:
            return None
        heads, device = call.query.shape[1], call.query.device
        pairs = torch.arange(self.rows.start * heads, self.rows.stop * heads, device=device).view(-1, self.group, 1, 1)
        queries = torch.arange(tile.start, tile.stop, device=device)[:, None] + self.queries.start - self.offset
        keys = torch.arange(run.start, run.stop, device=device) + self.keys.start
        kept = keep_mask(call.seed, pairs, queries, keys, call.dropout_p)
        return (kept.to(call.lse_dtype) / (1 - call.dropout_p)).flatten(1, 2)


def _parts(call: Call) -> Iterator[_Part]:
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
            yield _Part(call, slice(row, stop), slice(first, query_length), slice(start, end), offset)
        row = stop


def _forward_part(part: _Part, out: Tensor, lse: Tensor) -> None:
    """Fill the part's views of the output `(rows, Hq, Tq, dv)` and the log-sum-exp `(rows, Hq, Tq)`."""
    call = part.call
    key, value, queries = part.fold_keys(call.key), part.fold_keys(call.value), part.of_queries(call.query)
    for tile, runs in part.meetings():
        query = part.fold_tile(queries, tile) * call.scale
        total_out = query.new_zeros(*query.shape[:2], value.shape[2])
        top = query.new_full((*query.shape[:2], 1), -torch.inf)
        total = query.new_zeros(top.shape)
        for run, meeting in runs:
            score = part.scores(tile, run, meeting, query, key)
            new_top = torch.maximum(top, score.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a row that has seen nothing yet
            probability = score.sub_(base).exp_()
            decay = torch.exp(top - base)
            total.mul_(decay).add_(probability.sum(-1, keepdim=True))
            keep = part.keep(tile, run)
            if keep is not None:
                probability.mul_(keep)
            total_out.mul_(decay).baddbmm_(probability, value[:, run])
            top = new_top
        at = slice(tile.start - part.offset, tile.stop - part.offset)
        empty = total == 0
        out[:, :, at] = (total_out / total.masked_fill(empty, 1.0)).view_as(out[:, :, at])
        lse[:, :, at] = (top + total.log()).masked_fill(empty, torch.inf).view_as(lse[:, :, at])


def _backward_part(
    part: _Part, rows: tuple[Tensor, ...], query_grad: Tensor, bias_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fill the part's `query_grad`, add to the whole `bias_grad`; the gradients of its keys and values.

    `rows` are the part's views `(rows, Hq, Tq, …)` of the output's gradient, the log-sum-exp and delta; the results are
    `(rows, Hkv, n, r)` and `(rows, Hkv, n, dv)`.
    """
    call, (grad_out, lse, delta) = part.call, rows
    key, value, queries = part.fold_keys(call.key), part.fold_keys(call.value), part.of_queries(call.query)
    key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
    for tile, runs in part.meetings():
        query = part.fold_tile(queries, tile) * call.scale
        out_grad, tile_lse, tile_delta = (part.fold_tile(x, tile) for x in (grad_out, lse[..., None], delta[..., None]))
        tile_grad = torch.zeros_like(query)
        for run, meeting in runs:
            probability = part.scores(tile, run, meeting, query, key).sub_(tile_lse).exp_()
            score_grad = torch.bmm(out_grad, value[:, run].mT)
            keep = part.keep(tile, run)
            if keep is not None:
                score_grad.mul_(keep)
            value_grad[:, run].baddbmm_((probability if keep is None else probability * keep).mT, out_grad)
            score_grad = score_grad.sub_(tile_delta).mul_(probability).unflatten(1, (part.group, -1))
            if bias_grad is not None:
                target = part.bias_at(bias_grad, tile, run)
                target.add_(part.per_head(score_grad).sum_to_size(target.shape))
            meeting.add_grads(score_grad, query, key[:, run], tile_grad, key_grad[:, run])
        at = slice(tile.start - part.offset, tile.stop - part.offset)
        query_grad[:, :, at] = (tile_grad * call.scale).view_as(query_grad[:, :, at])
    heads = call.key.shape[1]
    count = len(key_grad) // heads
    return key_grad.unflatten(0, (count, heads)), value_grad.unflatten(0, (count, heads))
