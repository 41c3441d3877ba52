"""Attend with linear projections: all layers but the bilinear one.

Shapes: x (B, T, D), query (B, H, T, r), key (B, Hkv, T, r), value (B, Hkv, T, dv).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from structattn.layers.choices import HeadScale, head_scale
from structattn.layers.interface import QKV, Attention, draw_linears, new_linear, split_heads, width_per_head
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache
from structattn.layers.norm import LevelNorm, warn_of_degenerate_norm
from structattn.layers.options import LayerKeywords, LayerOptions
from structattn.ops.key_span import KeySpan

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ProjectedAttention(Attention):
    """Attention whose queries and keys are linear projections.

    Args:
        dim: `D`.
        heads: query heads `H`.
        level_ranks: widths of the levels of a head, which sum to `r`; pairs of a rotary embedding stay inside them.
        value_dim: `dv`.
        qk_norm: apply LayerNorm (gain, no shift) over the `r` dimensions of each query and key head. Heads share the
            gain. A rotary embedding comes after it. With `r` of 2 or less it cannot learn, and warns.
        options: shared by all layers.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        level_ranks: Sequence[int],
        value_dim: int,
        *,
        qk_norm: bool,
        options: LayerOptions,
    ) -> None:
        super().__init__(dim, heads, value_dim, options)
        self.level_ranks = tuple(level_ranks)
        self.head_dim = sum(self.level_ranks)
        if self.rotary is not None:
            self.rotary.check(self.level_ranks)
        self.q_proj = new_linear(dim, heads * self.head_dim, options)
        self.k_proj = new_linear(dim, self.kv_heads * self.head_dim, options)
        if qk_norm:
            warn_of_degenerate_norm((self.head_dim,), "take qk_norm=false, or fewer heads")
        self.q_norm = LevelNorm((self.head_dim,), device=options.device, dtype=options.dtype) if qk_norm else None
        self.k_norm = LevelNorm((self.head_dim,), device=options.device, dtype=options.dtype) if qk_norm else None
        draw_linears(self, options.generator)

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Return queries of `heads` heads, keys and values of `kv_heads` heads."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary is not None:
            query = self.rotary(query, positions, self.level_ranks)
            key = self.rotary(key, positions, self.level_ranks)
        return query, key, split_heads(self.v_proj(x), self.kv_heads)

    def cache_layout(self) -> CacheLayout:
        """Return a layout of all keys and values."""
        keys, values = (CacheSlice(self.kv_heads, width) for width in (self.head_dim, self.value_dim))
        return CacheLayout((keys,), (values,))

    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)` of the newest `Tq` cached tokens."""
        return self.attend(query, cache.keys[0].live, cache.values[0].live, span)


class ScaledAttention(ProjectedAttention):
    """Attention whose score is a scaled dot product over the whole head.

    `StandardAttention` explains the arguments.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        scale: HeadScale = "1/sqrt(r)",
        qk_norm: bool = True,
        **options: Unpack[LayerKeywords],
    ) -> None:
        head_dim = width_per_head(dim, heads, head_dim)
        factor = head_scale(scale, head_dim)
        super().__init__(dim, heads, (head_dim,), head_dim, qk_norm=qk_norm, options=LayerOptions(**options))
        self.scale = factor
