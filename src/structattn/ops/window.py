"""Sliding-window attention in O(T · window): blocks of queries, each against the run of keys its windows cover.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv); n blocks of c queries, K keys for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structattn import checks
from structattn.ops.arguments import check_key_bound, check_key_bounds, check_query_offset, check_tensors
from structattn.ops.standard import standard_attention


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_offset: int = 0,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention in which a query sees the keys near it alone.

    Query `i` stands at `query_offset + i` and sees key `j` where `|query_offset + i - j| < window`; where causal, the
    `window` keys up to and including itself. Time and memory are O(T · window); no `T x T` tensor is made. A query
    that sees no key, or stands before its row's first valid key, gives zeros and zero gradients.

    Args:
        query: `(B, Hq, Tq, r)`, float16, bfloat16, float32 or float64.
        key: `(B, Hkv, Tk, r)`, same dtype.
        value: `(B, Hkv, Tk, dv)`, same dtype; `dv` may differ from `r`.
        window: how many keys a causal query sees, itself among them; at least 1.
        is_causal: whether keys after the query are hidden.
        scale: factor on every score; `1/sqrt(r)` by default.
        key_start: `(B,)` integers, the first valid key of each row.
        key_end: `(B,)` integers, one past the last valid key of each row.
        query_offset: index of the first query among the keys.
        enable_gqa: allow `Hkv < Hq` (it must divide): query head `h` reads key head `h // (Hq / Hkv)`.
        dropout_p: share of probabilities to drop, drawn from the default generator.

    Returns:
        `(B, Hq, Tq, dv)`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    checks.positive_int("window", window)
    check_tensors(query, key, value, enable_gqa=enable_gqa)
    checks.probability("dropout_p", dropout_p)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else checks.finite("scale", scale)
    start, end = check_key_bound("key_start", key_start, query), check_key_bound("key_end", key_end, query)
    query_length, key_length = query.shape[2], key.shape[2]
    check_query_offset(query_offset, query_length, key_length)
    checks.boolean("is_causal", is_causal)
    check_key_bounds(start, end, key_length)
    if query_length == 0:  # There is no block to cut.
        return standard_attention(query, key, value, key_start=start, key_end=end, query_offset=query_offset)

    window = min(window, max(key_length, query_length))
    options = _Options(window, is_causal, scale, dropout_p)
    whole = query_offset == 0 and query_length == key_length and start is None and end is None
    if whole and query_length <= window:
        return standard_attention(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    if not (whole and is_causal):
        return _padded_blocks(query, key, value, start, end, query_offset, options)
    # The first window is plain causal attention; the keys of every later block begin one window before it.
    first = [tensor[:, :, :window] for tensor in (query, key, value)]
    return torch.cat(
        [
            standard_attention(*first, is_causal=True, scale=scale, dropout_p=dropout_p),
            _blocks(query[:, :, window:], key, value, window, options),
        ],
        dim=2,
    )


@dataclass(frozen=True)
class BlockCall:
    """`blocks` calls of dense attention, `queries` against `keys` each."""

    blocks: int
    queries: int
    keys: int
    is_causal: bool


def block_calls(length: int, window: int, is_causal: bool) -> list[BlockCall]:
    """The calls that `window_attention` makes on `length` tokens without padding: what it really computes."""
    if length <= window:
        return [BlockCall(1, length, length, is_causal)]
    if not is_causal:
        return [BlockCall(math.ceil(length / window), window, 3 * window, False)]
    block = min(window, length - window)
    blocks = math.ceil((length - window) / block)
    return [BlockCall(1, window, window, True), BlockCall(blocks, block, window + block, False)]


@dataclass(frozen=True)
class _Options:
    window: int
    is_causal: bool
    scale: float
    dropout_p: float


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, offset: int, options: _Options, mask: Tensor | None = None
) -> Tensor:
    """Queries from position `offset` on, cut into blocks: `(B, Hq, Tq, dv)`.

    `mask (B, n, c, K)` says what is visible; without one, what the window alone shows: right where the only keys beyond
    the ends lie after every query of a causal call.
    """
    batch, _, length, _ = query.shape
    window, reach = options.window, _reach(options)
    block = min(window, length)
    blocks = math.ceil(length / block)
    if mask is None:
        at = torch.arange(block, device=query.device)[:, None]
        mask = _in_window(at, torch.arange(-window, block + reach, device=query.device), options)[None, None]
    query = F.pad(query, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block))
    query = query.transpose(1, 2).flatten(0, 1)  # (B·n, Hq, c, r)
    run = window + block + reach
    front = window - offset  # negative: keys that no window reaches are cut away
    back = (blocks - 1) * block + run - front - key.shape[2]
    key, value = (
        # (B, Hkv, n, width, K) -> (B·n, Hkv, K, width)
        F.pad(tensor, (0, 0, front, back)).unfold(2, run, block).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for tensor in (key, value)
    )
    mask = mask.flatten(0, 1).unsqueeze(1)
    out = standard_attention(query, key, value, mask=mask, scale=options.scale, dropout_p=options.dropout_p)
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _padded_blocks(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None, offset: int, options: _Options
) -> Tensor:
    """`_blocks` with a mask for each row and block, for padded rows and wherever a run of keys passes both ends."""
    batch, _, length, _ = query.shape
    block = min(options.window, length)
    zero = torch.zeros(batch, dtype=torch.int64, device=query.device)
    first = (zero if start is None else start).view(-1, 1, 1, 1)
    last = (zero + key.shape[2] if end is None else end).view(-1, 1, 1, 1)
    block_start = torch.arange(offset, offset + length, block, device=query.device).view(1, -1, 1, 1)
    i = block_start + torch.arange(block, device=query.device)[:, None]
    j = block_start + torch.arange(-options.window, block + _reach(options), device=query.device)
    visible = _in_window(i, j, options) & (i >= first) & (j >= first) & (j < last)
    blind = ~visible.any(-1, keepdim=True)
    out = _blocks(query, key, value, offset, options, visible | blind)
    blind_queries = blind.flatten(1, 2)[:, None, :length]  # (B, 1, Tq, 1)
    return out.masked_fill(blind_queries, 0.0)


def _reach(options: _Options) -> int:
    """How many keys after a block its run covers."""
    return 0 if options.is_causal else options.window


def _in_window(i: Tensor, j: Tensor, options: _Options) -> Tensor:
    near = (i - j).abs() < options.window
    return near & (j <= i) if options.is_causal else near
