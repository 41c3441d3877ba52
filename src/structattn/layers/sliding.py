"""Sliding-window attention, alone and beside a global part: the paper's baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.choices import HeadScale, head_scale
from structattn.layers.interface import LayerOptions, ProjectedAttention, width_per_head
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache, Retention
from structattn.ops.dense import dense_attention
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.window import window_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Place(TypedDict):
    """Where queries and keys stand: arguments that both parts of an attention share."""

    key_start: Tensor | None
    key_end: Tensor | None
    query_offset: int


class SlidingWindowAttention(ProjectedAttention):
    """Multi-head attention to near tokens alone, in O(T · window).

    A causal token sees the `window` tokens up to and including itself; otherwise token `i` sees `j` where
    `|i - j| < window`.

    Args:
        dim: `D`.
        heads: query heads `H`.
        window: tokens seen.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, see `structattn.layers.choices.head_scale`.
        options: see `ProjectedAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        head_dim: int | None = None,
        scale: HeadScale = "1/sqrt(r)",
        **options: Unpack[LayerOptions],
    ) -> None:
        checks.positive_int("window", window)
        head_dim = width_per_head(dim, heads, head_dim)
        factor = head_scale(scale, head_dim)
        super().__init__(dim, heads, (head_dim,), head_dim, **options)
        self.window = window
        self.scale = factor

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        query_offset: int = 0,
    ) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        return window_attention(
            query,
            key,
            value,
            self.window,
            is_causal=self.is_causal,
            scale=self.scale,
            key_start=key_start,
            key_end=key_end,
            query_offset=query_offset,
            enable_gqa=True,
            dropout_p=self._dropout_p(),
        )

    def cache_layout(self) -> CacheLayout:
        """Keys and values of the last `window` tokens."""
        near = Retention(window=self.window)
        keys = CacheSlice(self.kv_heads, self.head_dim, near)
        return CacheLayout((keys,), CacheSlice(self.kv_heads, self.value_dim, near))

    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        offset = cache.length - cache.value.first - query.shape[2]
        start = _from(cache.value.first, key_start)
        return self.attend(query, cache.keys[0].live, cache.value.live, key_start=start, query_offset=offset)

    def key_numbers(self, length: int) -> int:
        """`min(T, window) · r` for each key head where causal, `T · r` where not."""
        return self.kv_heads * self.head_dim * (min(length, self.window) if self.is_causal else length)

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """What the blocks of the op multiply; if `dense`, a full window for every token."""
        return _window_flops(self, self.window, self.head_dim, length, batch, dense)

    def extra_repr(self) -> str:
        """With the window."""
        return f"window={self.window}, {super().extra_repr()}"


class GlobalSlidingWindowAttention(ProjectedAttention):
    """The sum of two attentions over split heads: global on the first dimensions, a sliding window on the others.

    With `g = global_rank`: `out = softmax(s_g · Q[:g] K[:g]ᵀ) V + softmax_window(s_w · Q[g:] K[g:]ᵀ) V`, the baseline
    of arXiv 2509.07963, section 5 (there with 32 of 64 dimensions global).

    Args:
        dim: `D`.
        heads: query heads `H`.
        window: tokens the second part sees, see `SlidingWindowAttention`.
        global_rank: `g`, below the head width.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, each part's for its own rank, see `structattn.layers.choices.head_scale`.
        options: see `ProjectedAttention`. The norm is over the whole head; a rotary embedding needs both ranks even.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        global_rank: int,
        *,
        head_dim: int | None = None,
        scale: HeadScale = "1/sqrt(r)",
        **options: Unpack[LayerOptions],
    ) -> None:
        checks.positive_int("window", window)
        head_dim = width_per_head(dim, heads, head_dim)
        if checks.positive_int("global_rank", global_rank) >= head_dim:
            raise ValueError(f"global_rank must be below the head width {head_dim}, got {global_rank}")
        ranks = (global_rank, head_dim - global_rank)
        factors = [head_scale(scale, rank) for rank in ranks]
        super().__init__(dim, heads, ranks, head_dim, **options)
        self.window = window
        self.global_rank = global_rank
        self.global_scale, self.window_scale = factors

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        query_offset: int = 0,
    ) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        global_query, near_query = query.split(self.level_ranks, -1)
        global_key, near_key = key.split(self.level_ranks, -1)
        place: _Place = {"key_start": key_start, "key_end": key_end, "query_offset": query_offset}
        far = self._attend_globally(global_query, global_key, value, place)
        near = self._attend_nearby(near_query, near_key, value, place)
        return far + near

    def _attend_globally(self, query: Tensor, key: Tensor, value: Tensor, place: _Place) -> Tensor:
        return dense_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            scale=self.global_scale,
            dropout_p=self._dropout_p(),
            **place,
        )

    def _attend_nearby(self, query: Tensor, key: Tensor, value: Tensor, place: _Place) -> Tensor:
        return window_attention(
            query,
            key,
            value,
            self.window,
            is_causal=self.is_causal,
            scale=self.window_scale,
            enable_gqa=True,
            dropout_p=self._dropout_p(),
            **place,
        )

    def cache_layout(self) -> CacheLayout:
        """Global keys and values of all tokens, the other keys of the last `window`."""
        far = CacheSlice(self.kv_heads, self.global_rank)
        near = CacheSlice(self.kv_heads, self.head_dim - self.global_rank, Retention(window=self.window))
        return CacheLayout((far, near), CacheSlice(self.kv_heads, self.value_dim))

    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        global_query, near_query = query.split(self.level_ranks, -1)
        global_keys, near_keys = cache.keys
        offset, first = cache.length - query.shape[2], near_keys.first
        place: _Place = {"key_start": key_start, "key_end": None, "query_offset": offset}
        far = self._attend_globally(global_query, global_keys.live, cache.value.live, place)
        place = {"key_start": _from(first, key_start), "key_end": None, "query_offset": offset - first}
        near = self._attend_nearby(near_query, near_keys.live, cache.value.live[:, :, first:], place)
        return far + near

    def key_numbers(self, length: int) -> int:
        """`T·g + min(T, window)·(r - g)` for each key head where causal, `T·r` where not."""
        near = min(length, self.window) if self.is_causal else length
        return self.kv_heads * (self.global_rank * length + (self.head_dim - self.global_rank) * near)

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Both parts, each with its scores and its mixing of all values."""
        flat, causal = Hierarchy.flat(self.global_rank), self.is_causal and not dense
        far = flops.attention(flat, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal)
        return far + _window_flops(self, self.window, self.head_dim - self.global_rank, length, batch, dense)

    def extra_repr(self) -> str:
        """With the window and the global rank."""
        return f"window={self.window}, global_rank={self.global_rank}, {super().extra_repr()}"


def _from(first: int, key_start: Tensor | None) -> Tensor | None:
    """Starts of rows, counted from the key at index `first`."""
    return None if key_start is None else (key_start - first).clamp(min=0)


def _window_flops(layer: ProjectedAttention, window: int, rank: int, length: int, batch: int, dense: bool) -> Flops:
    if dense:
        seen = min(length, window if layer.is_causal else 2 * window - 1)
        return flops.attention(Hierarchy.flat(rank), layer.value_dim, length, seen, heads=layer.heads, batch=batch)
    return flops.sliding_window(
        window, rank, layer.value_dim, length, heads=layer.heads, batch=batch, is_causal=layer.is_causal
    )
