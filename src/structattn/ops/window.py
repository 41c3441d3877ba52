"""Compute sliding-window attention in O(T · window).

Each block of queries attends to the run of keys that its windows cover.

Shapes: query (B, Hq, Tq, r), key (B, Hkv, Tk, r), value (B, Hkv, Tk, dv); n blocks of c queries, K keys for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structattn import checks
from structattn.ops.arguments import check_key_bounds, check_key_span, check_tensors
from structattn.ops.key_span import UNPADDED, KeySpan
from structattn.ops.standard import standard_attention


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    span: KeySpan = UNPADDED,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention in which a query sees only the keys near it.

    Query `i` stands at `query_offset + i` and sees key `j` where `|query_offset + i - j| < window`; where causal, the
    `window` keys up to and including itself. Time and memory are O(T · window); no `T x T` tensor is made. A query
    that sees no key, or stands before its row's first valid key, gives zeros and zero gradients.

    Args:
        query: `(B, Hq, Tq, r)`, float16, bfloat16, float32 or float64.
        key: `(B, Hkv, Tk, r)`, same dtype.
        value: `(B, Hkv, Tk, dv)`, same dtype; `dv` may differ from `r`.
        window: number of keys that a causal query sees, itself included; at least 1.
        span: valid keys of each row and offset of the queries.
        is_causal: hide the keys after each query.
        scale: factor on every score; `1/sqrt(r)` by default.
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
    query_length, key_length = query.shape[2], key.shape[2]
    span = check_key_span(span, query, key_length)
    checks.boolean("is_causal", is_causal)
    check_key_bounds(span.key_start, span.key_end, key_length)
    if query_length == 0:  # There is no block to cut.
        return standard_attention(query, key, value, span)

    window = min(window, max(key_length, query_length))
    options = _Options(window, is_causal, scale, dropout_p)
    is_whole = not span.is_padded and span.query_offset == 0 and query_length == key_length
    if is_whole and query_length <= window:
        return standard_attention(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    if not (is_whole and is_causal):
        return _masked_blocks(query, key, value, span, options)
    # The first window is plain causal attention; the keys of every later block begin one window before it.
    first_query, first_key, first_value = (tensor[:, :, :window] for tensor in (query, key, value))
    first = standard_attention(first_query, first_key, first_value, is_causal=True, scale=scale, dropout_p=dropout_p)
    return torch.cat([first, _blocks(query[:, :, window:], key, value, window, options)], dim=2)


@dataclass(frozen=True)
class BlockCall:
    """`blocks` calls of standard attention, each of `queries` against `keys`."""

    blocks: int
    queries: int
    keys: int
    is_causal: bool


def block_calls(length: int, window: int, is_causal: bool) -> list[BlockCall]:
    """Return the calls that `window_attention` makes on `length` tokens without padding."""
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

    @property
    def keys_after(self) -> int:
        """Number of keys after a block of queries that its run covers."""
        return 0 if self.is_causal else self.window

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Return True where a query at `i` sees a key at `j`."""
        near = (i - j).abs() < self.window
        return near & (j <= i) if self.is_causal else near


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, offset: int, options: _Options, mask: Tensor | None = None
) -> Tensor:
    """Return `(B, Hq, Tq, dv)` for queries from position `offset` on, cut into blocks.

    `mask (B, n, c, K)` is True where a pair is visible. Without one, the window alone decides: that is right only for a
    causal call, whose run of keys passes the end of the row only after the last query.
    """
    batch, _, length, _ = query.shape
    window, after = options.window, options.keys_after
    block = min(window, length)
    blocks = math.ceil(length / block)
    if mask is None:
        at = torch.arange(block, device=query.device)[:, None]
        mask = options.visible(at, torch.arange(-window, block + after, device=query.device))[None, None]
    query = F.pad(query, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block))
    query = query.transpose(1, 2).flatten(0, 1)  # (B·n, Hq, c, r)
    run = window + block + after
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


def _masked_blocks(query: Tensor, key: Tensor, value: Tensor, span: KeySpan, options: _Options) -> Tensor:
    """Like `_blocks`, with a mask for each row and block: for padding, and for runs that pass both ends of the keys."""
    batch, _, length, _ = query.shape
    block = min(options.window, length)
    zero = torch.zeros(batch, dtype=torch.int64, device=query.device)
    first = (zero if span.key_start is None else span.key_start).view(-1, 1, 1, 1)
    last = (zero + key.shape[2] if span.key_end is None else span.key_end).view(-1, 1, 1, 1)
    offset = span.query_offset
    block_start = torch.arange(offset, offset + length, block, device=query.device).view(1, -1, 1, 1)
    i = block_start + torch.arange(block, device=query.device)[:, None]
    j = block_start + torch.arange(-options.window, block + options.keys_after, device=query.device)
    visible = options.visible(i, j) & (i >= first) & (j >= first) & (j < last)
    no_keys_visible = ~visible.any(-1, keepdim=True)
    # A query without visible keys attends to all of its run, so that softmax is finite, and is set to zero after.
    out = _blocks(query, key, value, offset, options, visible | no_keys_visible)
    return out.masked_fill(no_keys_visible.flatten(1, 2)[:, None, :length], 0.0)
