"""Attend by MLR: long dot products for near pairs, short ones for far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from structattn import flops
from structattn.flops import Flops
from structattn.layers.choices import LevelWeight, level_weights, spread
from structattn.layers.head_basis import HeadBasis
from structattn.layers.interface import QKV, width_per_head
from structattn.layers.kv_cache import CacheLayout, KeyValueCache, attend_mlr_cache, mlr_cache_layout
from structattn.layers.options import LayerKeywords, LayerOptions
from structattn.layers.projected import ProjectedAttention
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MLRAttention(ProjectedAttention):
    """Multi-head attention with a Multi-Level Low Rank score matrix.

    See arXiv 2509.07963, section 4, and `Hierarchy`. With level weights `α_l`, ranks and gains `c_m` of the hierarchy::

        score(i, j) = c_m · Σ_{l <= m} α_l · ⟨q_i, k_j⟩ over the dimensions of level l        m = depth(i, j)

    Values are mixed by level where the hierarchy has value ranks. The paper's setting for language is
    `Hierarchy.dyadic(ranks, context_length, gains="mean")` with `α_l = 1/r_l` and LayerNorm on each query and key head.

    Args:
        dim: `D`.
        heads: query heads `H`.
        hierarchy: the levels; the width of a query and key head is the sum of its ranks.
        head_dim: the width of a value head; by default the sum of the value ranks, or `D / H` where there are none. The
            attribute `head_dim` is another width, that of a query and key head (the sum of the ranks); the attribute
            `value_dim` is this one.
        level_weight: `α_l`, see `structattn.layers.choices.level_weights`.
        basis: map queries and keys by a `structattn.layers.head_basis.HeadBasis` before the levels. It orders the
            dimensions of a model that was trained without levels.
        qk_norm: apply LayerNorm to each query and key head, see `ProjectedAttention`.
        options: see `LayerOptions`. A rotary embedding needs even ranks.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hierarchy: Hierarchy,
        *,
        head_dim: int | None = None,
        level_weight: LevelWeight = "1/sqrt(r_l)",
        basis: bool = False,
        qk_norm: bool = True,
        **options: Unpack[LayerKeywords],
    ) -> None:
        if not isinstance(hierarchy, Hierarchy):
            raise TypeError(f"hierarchy must be a structattn.Hierarchy, got {type(hierarchy).__name__}")
        weights = level_weights(level_weight, hierarchy.ranks)
        if hierarchy.value_ranks is None:
            value_dim = width_per_head(dim, heads, head_dim)
        else:
            value_dim = sum(hierarchy.value_widths(head_dim))
        super().__init__(dim, heads, hierarchy.ranks, value_dim, qk_norm=qk_norm, options=LayerOptions(**options))
        self.hierarchy = hierarchy
        self.level_weights = weights
        weight = self.q_proj.weight
        self.basis = (
            HeadBasis(self.kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype) if basis else None
        )

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Return queries multiplied by the level weights, keys and values."""
        query, key, value = super().project(x, positions)
        if self.basis is not None:
            query, key = self.basis(query, key)
        return query * spread(self.level_weights, self.level_ranks, query), key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)`."""
        return self._attend_by_level(query, key, value, self.hierarchy, 1.0, span)

    def cache_layout(self) -> CacheLayout:
        """Return the layout of `mlr_cache_layout`."""
        return mlr_cache_layout(self.hierarchy, self.kv_heads, self.value_dim)

    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)` of the newest `Tq` cached tokens."""
        return attend_mlr_cache(query, cache, self.hierarchy, scale=1.0, key_start=span.key_start)

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the FLOPs of scores, of mixing values, and of the basis."""
        causal = self.is_causal and not dense
        maps = Flops(0, 0) if self.basis is None else self.basis.flops(self.heads, batch * length)
        return maps + flops.attention(
            self.hierarchy, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal
        )

    def extra_repr(self) -> str:
        """Return the settings, the hierarchy first."""
        return f"hierarchy={self.hierarchy}, {super().extra_repr()}"
