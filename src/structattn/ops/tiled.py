"""MLR attention in PyTorch alone, tile by tile: memory O(T), scores recomputed in the backward pass.

A query tile meets the keys in runs of one depth: far runs multiply only the prefix R_m of q and k. Only where a tile
crosses blocks finer than itself are levels masked one by one.

Shapes in here: N = batch · key heads, G = query heads per key head; a query tile is folded to (N, G·t, r), so that one
batched product serves all query heads that share a key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from structattn.ops.call import Call
from structattn.ops.dropout import keep_mask
from structattn.ops.hierarchy import Hierarchy

_QUERY_TILE = 128
_KEY_TILE = 1024
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
        for tile, tile_out, tile_lse in _forward_part(part):
            queries = slice(part.queries.start + tile.start, part.queries.start + tile.stop)
            out[part.rows, :, queries] = tile_out
            lse[part.rows, :, queries] = tile_lse
    return out, lse


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, *, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, see `Backend`."""
    grads = [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (call.query, call.key, call.value)
    ]
    bias_grad = None
    if needs_bias_grad and call.attn_bias is not None:
        bias_grad = torch.zeros(call.attn_bias.shape, dtype=call.lse_dtype, device=call.query.device)
    delta = (grad_out.to(call.lse_dtype) * out).sum(-1)
    for part in _parts(call):
        index = (part.rows, slice(None), part.queries)
        results = _backward_part(part, grad_out[index], lse[index], delta[index], bias_grad)
        grads[0][index] = results[0]
        for grad, result in zip(grads[1:], results[1:], strict=True):
            grad[part.rows, :, part.keys] = result
    if bias_grad is not None and call.attn_bias is not None:
        bias_grad = bias_grad.to(call.attn_bias.dtype)
    return grads[0], grads[1], grads[2], bias_grad


@dataclass(frozen=True)
class _Part:
    """Rows that share one range of valid keys, with the padding cut away; tensors are views, or cast copies.

    Positions count from the first valid key: query index 0 of the part stands at `offset`, key index 0 at 0.
    """

    call: Call
    rows: slice
    queries: slice
    keys: slice
    offset: int

    @property
    def length(self) -> int:
        return self.queries.stop - self.queries.start

    def query_tiles(self) -> Iterator[slice]:
        """Tiles in query indices of the part, with edges at multiples of the tile size in positions."""
        size = _tile_size(self.call.hierarchy)
        position, end = self.offset, self.offset + self.length
        while position < end:
            stop = min(position // size * size + size, end)
            yield slice(position - self.offset, stop - self.offset)
            position = stop

    def fold_queries(self, tensor: Tensor, tile: slice) -> Tensor:
        """`(B, Hq, T, w)` of the part's rows, cut to the tile, as `(N, G·t, w)` in the accumulation dtype."""
        folded = tensor[:, :, tile].to(self.call.lse_dtype)
        return folded.reshape(-1, self.group * folded.shape[2], folded.shape[3])

    @property
    def group(self) -> int:
        """G, the query heads that share one key head."""
        return self.call.query.shape[1] // self.call.key.shape[1]

    def fold_keys(self, tensor: Tensor) -> Tensor:
        """Valid keys or values of the part's rows as `(N, n, w)` in the accumulation dtype."""
        return tensor[self.rows, :, self.keys].to(self.call.lse_dtype).flatten(0, 1)


@dataclass(frozen=True)
class _Meeting:
    """How a query tile meets a run of keys: what all pairs share, and what only some do.

    `prefix` dimensions count for every pair; each `(columns, mask)` of `partial` for the pairs in its `(t, n)` mask.
    `gain` is one number, or `(t, n)` where depths differ. `hidden (t, n)` marks pairs the causal mask removes.
    """

    prefix: int
    partial: list[tuple[slice, Tensor]]
    gain: float | Tensor
    hidden: Tensor | None


def _parts(call: Call) -> Iterator[_Part]:
    (batch, heads, query_length, _), key_length = call.query.shape, call.key.shape[2]
    starts = [0] * batch if call.key_start is None else call.key_start.tolist()
    ends = [key_length] * batch if call.key_end is None else call.key_end.tolist()
    scores_per_row = heads * min(_QUERY_TILE, query_length) * min(_KEY_TILE, key_length)
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


def _tile_size(hierarchy: Hierarchy) -> int:
    """The number of queries per tile: whole blocks of the coarsest level that fits, evenly inside the next coarser."""
    finite = [size for size in hierarchy.block_sizes[1:] if size]
    base = next((size for size in finite if size <= _QUERY_TILE), 1)
    coarser = min((size for size in finite if size > _QUERY_TILE), default=0)
    most = _QUERY_TILE // base
    even = next((count for count in range(most, most // 4, -1) if coarser % (base * count) == 0), most)
    return base * even


def _key_runs(hierarchy: Hierarchy, first: int, last: int, key_length: int, is_causal: bool) -> Iterator[slice]:
    """Keys that queries at positions `first..last` see, cut where the depth changes and into `_KEY_TILE` at most."""
    end = min(last + 1, key_length) if is_causal else key_length
    edges = {0, end}
    for size in hierarchy.block_sizes[1:]:
        if size:
            edges |= {min(first // size * size, end), min(last // size * size + size, end)}
            if size <= last - first:  # finer levels lie within the tile: their edges are its own
                break
    marks = sorted(edges)
    for start, stop in itertools.pairwise(marks):
        for at in range(start, stop, _KEY_TILE):
            yield slice(at, min(at + _KEY_TILE, stop))


def _meet(call: Call, first: int, last: int, run: slice) -> _Meeting:
    hierarchy, device, dtype = call.hierarchy, call.query.device, call.lse_dtype
    i = torch.arange(first, last + 1, device=device)[:, None]
    j = torch.arange(run.start, run.stop, device=device)
    shared, partial, start = 0, [], 0
    for size, stop in zip(hierarchy.block_sizes, hierarchy.prefix_ranks, strict=True):
        first_blocks = {first // size, run.start // size} if size else {0}
        last_blocks = {last // size, (run.stop - 1) // size} if size else {0}
        if len(first_blocks | last_blocks) == 1:
            shared += 1
        elif size and max(first_blocks) <= min(last_blocks):
            partial.append((slice(start, stop), (i // size == j // size).to(dtype)))
        else:
            break
        start = stop
    gain: float | Tensor = hierarchy.gains[shared - 1]
    if len(set(hierarchy.gains[shared - 1 : shared + len(partial)])) > 1:
        gain = torch.tensor(hierarchy.gains, dtype=dtype, device=device)[hierarchy.depth(i, j) - 1]
    hidden = j > i if call.is_causal and run.stop - 1 > first else None
    return _Meeting(hierarchy.prefix_ranks[shared - 1], partial, gain, hidden)


def _scores(part: _Part, tile: slice, run: slice, meeting: _Meeting, query: Tensor, key: Tensor) -> Tensor:
    """Scores `(N, G, t, n)` of a folded query tile (scaled already) against a run of keys, `-inf` where hidden."""
    t, n = tile.stop - tile.start, run.stop - run.start
    key = key[:, run].transpose(1, 2)
    prefix = meeting.prefix
    score = torch.bmm(query[..., :prefix], key[:, :prefix]).view(-1, part.group, t, n)
    for columns, mask in meeting.partial:
        score.addcmul_(torch.bmm(query[..., columns], key[:, columns]).view_as(score), mask)
    if not isinstance(meeting.gain, float) or meeting.gain != 1.0:
        score.mul_(meeting.gain)
    if part.call.attn_bias is not None:
        score = score.view(-1, part.call.query.shape[1], t, n).add_(_bias_at(part, tile, run, part.call.attn_bias))
        score = score.view(-1, part.group, t, n)
    if meeting.hidden is not None:
        score.masked_fill_(meeting.hidden, -torch.inf)
    return score


def _bias_at(part: _Part, tile: slice, run: slice, bias: Tensor) -> Tensor:
    """The part of a bias-shaped tensor that a tile and a run read, broadcast axes left as they are."""
    q, k = part.queries.start, part.keys.start
    wanted = (
        part.rows,
        slice(None),
        slice(q + tile.start, q + tile.stop),
        slice(k + run.start, k + run.stop),
    )
    return bias[tuple(slice(None) if size == 1 else cut for size, cut in zip(bias.shape, wanted, strict=True))]


def _keep(part: _Part, tile: slice, run: slice) -> Tensor | None:
    """Dropout's factor on the probabilities, `(N, G, t, n)`: 0 or `1/(1 - p)`; None without dropout."""
    call = part.call
    if call.seed is None:
        return None
    heads, device = call.query.shape[1], call.query.device
    pairs = torch.arange(part.rows.start * heads, part.rows.stop * heads, device=device).view(-1, part.group, 1, 1)
    queries = torch.arange(tile.start, tile.stop, device=device)[:, None] + part.queries.start
    keys = torch.arange(run.start, run.stop, device=device) + part.keys.start
    return keep_mask(call.seed, pairs, queries, keys, call.dropout_p).to(call.lse_dtype) / (1 - call.dropout_p)


def _forward_part(part: _Part) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each query tile: its indices, output `(rows, Hq, t, dv)` and log-sum-exp `(rows, Hq, t)`."""
    call = part.call
    key, value = part.fold_keys(call.key), part.fold_keys(call.value)
    queries = call.query[part.rows, :, part.queries]
    for tile in part.query_tiles():
        query = part.fold_queries(queries, tile) * call.scale
        out = query.new_zeros(*query.shape[:2], value.shape[2])
        top = query.new_full((*query.shape[:2], 1), -torch.inf)
        total = query.new_zeros(top.shape)
        first, last = part.offset + tile.start, part.offset + tile.stop - 1
        for run in _key_runs(call.hierarchy, first, last, key.shape[1], call.is_causal):
            score = _scores(part, tile, run, _meet(call, first, last, run), query, key).flatten(1, 2)
            new_top = torch.maximum(top, score.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)
            probability = score.sub_(base).exp_()
            decay = torch.exp(top - base)
            total.mul_(decay).add_(probability.sum(-1, keepdim=True))
            keep = _keep(part, tile, run)
            if keep is not None:
                probability.mul_(keep.flatten(1, 2))
            out.mul_(decay).baddbmm_(probability, value[:, run])
            top = new_top
        out = out / total.masked_fill(total == 0, 1.0)
        lse = torch.where(total == 0, torch.inf, top + total.log())
        shape = (-1, call.query.shape[1], tile.stop - tile.start)
        yield tile, out.view(*shape, value.shape[2]), lse.view(shape)


def _backward_part(
    part: _Part, grad_out: Tensor, lse: Tensor, delta: Tensor, bias_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(rows, Hq, Tq, r)`, `(rows, Hkv, n, r)`, `(rows, Hkv, n, dv)` of a part; adds to `bias_grad`."""
    call = part.call
    key, value = part.fold_keys(call.key), part.fold_keys(call.value)
    queries = call.query[part.rows, :, part.queries]
    query_grad = queries.new_empty(queries.shape, dtype=call.lse_dtype)
    key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
    for tile in part.query_tiles():
        query = part.fold_queries(queries, tile) * call.scale
        out_grad = part.fold_queries(grad_out, tile)
        tile_lse, tile_delta = (part.fold_queries(rows[..., None], tile) for rows in (lse, delta))
        tile_grad = torch.zeros_like(query)
        first, last = part.offset + tile.start, part.offset + tile.stop - 1
        for run in _key_runs(call.hierarchy, first, last, key.shape[1], call.is_causal):
            meeting = _meet(call, first, last, run)
            score = _scores(part, tile, run, meeting, query, key)
            probability = score.flatten(1, 2).sub_(tile_lse).exp_()
            probability_grad = torch.bmm(out_grad, value[:, run].transpose(1, 2))
            keep = _keep(part, tile, run)
            if keep is None:
                value_grad[:, run].baddbmm_(probability.transpose(1, 2), out_grad)
            else:
                dropped = probability * keep.flatten(1, 2)
                value_grad[:, run].baddbmm_(dropped.transpose(1, 2), out_grad)
                probability_grad.mul_(keep.flatten(1, 2))
            score_grad = probability_grad.sub_(tile_delta).mul_(probability).view_as(score)
            if bias_grad is not None:
                _add_bias_grad(part, tile, run, score_grad, bias_grad)
            if not isinstance(meeting.gain, float) or meeting.gain != 1.0:
                score_grad.mul_(meeting.gain)
            terms = [(slice(0, meeting.prefix), score_grad)]
            terms += [(columns, score_grad * mask) for columns, mask in meeting.partial]
            for columns, term in terms:
                flat = term.flatten(1, 2)
                tile_grad[..., columns].baddbmm_(flat, key[:, run, columns])
                key_grad[:, run, columns].baddbmm_(flat.transpose(1, 2), query[..., columns])
        query_grad[:, :, tile] = (tile_grad * call.scale).view(query_grad[:, :, tile].shape)
    rows = queries.shape[0]
    return query_grad, key_grad.unflatten(0, (rows, -1)), value_grad.unflatten(0, (rows, -1))


def _add_bias_grad(part: _Part, tile: slice, run: slice, score_grad: Tensor, bias_grad: Tensor) -> None:
    target = _bias_at(part, tile, run, bias_grad)
    full = score_grad.view(-1, part.call.query.shape[1], *score_grad.shape[2:])
    target.add_(full.sum_to_size(target.shape))
