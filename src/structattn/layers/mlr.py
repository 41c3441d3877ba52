"""MLR attention: near pairs get a rich dot product, far pairs a cheap one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from structattn import flops
from structattn.flops import Flops
from structattn.layers.choices import LevelWeight, level_weights, spread
from structattn.layers.head_basis import Basis
from structattn.layers.interface import QKV, LayerOptions, ProjectedAttention, width_per_head
from structattn.layers.kv_cache import CacheLayout, KeyValueCache, attend_mlr_cache, mlr_cache_layout
from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MLRAttention(ProjectedAttention):
    """Multi-head attention whose score matrix is Multi-Level Low Rank (arXiv 2509.07963, section 4).

    With the level weights `w_l`, and block sizes, ranks and gains `c_m` from the hierarchy::

        score(i, j) = c_m · Σ_{l <= m} w_l · ⟨q_i, k_j⟩ over the dimensions of level l        m = depth(i, j)

    The paper's setting for language is the default with `Hierarchy.dyadic(ranks, context_length, gains="mean")`:
    LayerNorm on each query and key head, `w_l = 1/r_l`, `c_m = 1/m`.

    Args:
        dim: `D`.
        heads: query heads `H`.
        hierarchy: the levels; the width of a query and key head is the sum of its ranks.
        head_dim: the width of a value head; `D / H` by default.
        level_weight: `w_l`, see `structattn.layers.choices.level_weights`.
        basis: map queries and keys before the levels by a `structattn.layers.head_basis.Basis`: it orders the
            dimensions of a model that was trained without levels.
        options: see `ProjectedAttention`. A rotary embedding needs even ranks.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hierarchy: Hierarchy,
        *,
        head_dim: int | None = None,
        level_weight: LevelWeight = "1/r_l",
        basis: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        if not isinstance(hierarchy, Hierarchy):
            raise TypeError(f"hierarchy must be a structattn.Hierarchy, got {type(hierarchy).__name__}")
        weights = level_weights(level_weight, hierarchy.ranks)
        super().__init__(dim, heads, hierarchy.ranks, width_per_head(dim, heads, head_dim), **options)
        self.hierarchy = hierarchy
        self.level_weights = weights
        weight = self.q_proj.weight
        self.basis = Basis(self.kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype) if basis else None

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Queries, with the level weights on them, keys and values."""
        query, key, value = super().project(x, positions)
        if self.basis is not None:
            query, key = self.basis(query, key)
        return query * spread(self.level_weights, self.level_ranks, query), key, value

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
        return mlr_attention(
            query,
            key,
            value,
            self.hierarchy,
            is_causal=self.is_causal,
            scale=1.0,
            key_start=key_start,
            key_end=key_end,
            query_offset=query_offset,
            enable_gqa=True,
            dropout_p=self._dropout_p(),
        )

    def cache_layout(self) -> CacheLayout:
        """Keys level by level, level `l` for the current block alone; all values."""
        return mlr_cache_layout(self.hierarchy, self.kv_heads, self.value_dim)

    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        return attend_mlr_cache(query, cache, self.hierarchy, scale=1.0, key_start=key_start)

    def key_numbers(self, length: int) -> int:
        """`T·r_1 + Σ_{l≥2} r_l · (T mod b_l or b_l)` for each key head where causal, `T·r` where not."""
        per_head = self.hierarchy.key_numbers(length) if self.is_causal else length * self.head_dim
        return self.kv_heads * per_head

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Scores over the visible pairs that share each level, mixing of values over all visible pairs, the basis."""
        causal = self.is_causal and not dense
        maps = Flops(0, 0) if self.basis is None else self.basis.flops(self.heads, batch * length)
        return maps + flops.attention(
            self.hierarchy, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal
        )

    def extra_repr(self) -> str:
        """With the hierarchy."""
        return f"hierarchy={self.hierarchy}, {super().extra_repr()}"
