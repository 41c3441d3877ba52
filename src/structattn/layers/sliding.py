"""Sliding-window attention, alone and beside a global part: the paper's baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.choices import HeadScale, head_scale
from structattn.layers.interface import width_per_head
from structattn.layers.kv_cache import (
    CacheLayout,
    CacheSlice,
    KeyValueCache,
    Retention,
    attend_mlr_cache,
    mlr_cache_layout,
)
from structattn.layers.options import LayerKeywords, LayerOptions
from structattn.layers.projected import ProjectedAttention, ScaledAttention
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SlidingWindowAttention(ScaledAttention):
    """Multi-head attention to near tokens alone, in O(T · window).

    A causal token sees the `window` tokens up to and including itself; otherwise token `i` sees `j` where
    `|i - j| < window`. It is MLR attention of one level, `Hierarchy((r,), windows=(window,))`.

    Args:
        dim: `D`.
        heads: query heads `H`.
        window: tokens seen.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, see `structattn.layers.choices.head_scale`.
        qk_norm: apply LayerNorm to each query and key head, see `ProjectedAttention`.
        options: see `LayerOptions`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        head_dim: int | None = None,
        scale: HeadScale = "1/sqrt(r)",
        qk_norm: bool = True,
        **options: Unpack[LayerKeywords],
    ) -> None:
        checks.positive_int("window", window)
        super().__init__(dim, heads, head_dim=head_dim, scale=scale, qk_norm=qk_norm, **options)
        self.window = window
        self.hierarchy = Hierarchy((self.head_dim,), windows=(window,))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)`."""
        return self._attend_by_level(query, key, value, self.hierarchy, self.scale, span)

    def cache_layout(self) -> CacheLayout:
        """Return a layout of the last `window` tokens' keys and values."""
        return mlr_cache_layout(self.hierarchy, self.kv_heads, self.value_dim)

    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)` of the newest `Tq` cached tokens."""
        return attend_mlr_cache(query, cache, self.hierarchy, scale=self.scale, key_start=span.key_start)

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the window's FLOPs; with `dense`, of full windows for all tokens."""
        return _window_flops(self, self.hierarchy, length, batch, dense)

    def extra_repr(self) -> str:
        """Return the settings, the window first."""
        return f"window={self.window}, {super().extra_repr()}"


class GlobalSlidingWindowAttention(ProjectedAttention):
    """Sum of a global and a sliding-window attention over split heads.

    The first dimensions are global; the others see a window. With `g = global_rank`: `out = softmax(s_g · Q[:g] K[:g]ᵀ)
    V + softmax_window(s_w · Q[g:] K[g:]ᵀ) V`, the baseline of arXiv 2509.07963, section 5 (there with 32 of 64
    dimensions global).

    Args:
        dim: `D`.
        heads: query heads `H`.
        window: tokens that the second part sees, see `SlidingWindowAttention`.
        global_rank: `g`, below the head width.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, each part's for its own rank, see `structattn.layers.choices.head_scale`.
        qk_norm: apply LayerNorm to each whole query and key head, see `ProjectedAttention`.
        options: see `LayerOptions`. A rotary embedding needs both ranks even.
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
        qk_norm: bool = True,
        **options: Unpack[LayerKeywords],
    ) -> None:
        checks.positive_int("window", window)
        head_dim = width_per_head(dim, heads, head_dim)
        if checks.positive_int("global_rank", global_rank) >= head_dim:
            raise ValueError(f"global_rank must be below the head width {head_dim}, got {global_rank}")
        ranks = (global_rank, head_dim - global_rank)
        factors = [head_scale(scale, rank) for rank in ranks]
        super().__init__(dim, heads, ranks, head_dim, qk_norm=qk_norm, options=LayerOptions(**options))
        self.window = window
        self.global_rank = global_rank
        self.near_hierarchy = Hierarchy((head_dim - global_rank,), windows=(window,))
        self.global_scale, self.window_scale = factors

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)`."""
        global_query, near_query = query.split(self.level_ranks, -1)
        global_key, near_key = key.split(self.level_ranks, -1)
        far = self._attend_to_all(global_query, global_key, value, self.global_scale, span)
        return far + self._attend_by_level(near_query, near_key, value, self.near_hierarchy, self.window_scale, span)

    def cache_layout(self) -> CacheLayout:
        """Return a layout of global keys, near keys by window, and values."""
        far = CacheSlice(self.kv_heads, self.global_rank)
        near = CacheSlice(self.kv_heads, self.head_dim - self.global_rank, Retention(window=self.window))
        return CacheLayout((far, near), (CacheSlice(self.kv_heads, self.value_dim),))

    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)` of the newest `Tq` cached tokens."""
        global_query, near_query = query.split(self.level_ranks, -1)
        global_keys, near_keys = cache.keys
        far = self._attend_to_all(global_query, global_keys.live, cache.values[0].live, self.global_scale, span)
        near_value, near_span = cache.values[0].live[:, :, near_keys.first :], span.from_key(near_keys.first)
        near = self._attend_by_level(
            near_query, near_keys.live, near_value, self.near_hierarchy, self.window_scale, near_span
        )
        return far + near

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the FLOPs of both parts, each with all its values."""
        far = self._dot_product_flops(self.global_rank, length, batch, dense)
        return far + _window_flops(self, self.near_hierarchy, length, batch, dense)

    def extra_repr(self) -> str:
        """Return the settings, window and global rank first."""
        return f"window={self.window}, global_rank={self.global_rank}, {super().extra_repr()}"


def _window_flops(layer: ProjectedAttention, hierarchy: Hierarchy, length: int, batch: int, dense: bool) -> Flops:
    if not dense:
        causal = layer.is_causal
        return flops.attention(hierarchy, layer.value_dim, length, heads=layer.heads, batch=batch, is_causal=causal)
    window = hierarchy.sizes[0] or length
    seen = min(length, window if layer.is_causal else 2 * window - 1)
    flat = Hierarchy.flat(hierarchy.rank)
    return flops.attention(flat, layer.value_dim, length, seen, heads=layer.heads, batch=batch)
