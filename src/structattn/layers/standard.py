"""Standard attention: the same `r`-dimensional dot product for every pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from structattn import flops
from structattn.flops import Flops
from structattn.layers.choices import HeadScale, head_scale
from structattn.layers.interface import LayerOptions, ProjectedAttention, width_per_head
from structattn.ops.dense import dense_attention
from structattn.ops.hierarchy import Hierarchy

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StandardAttention(ProjectedAttention):
    """Multi-head attention: `out = softmax(scale · Q Kᵀ) V`.

    Args:
        dim: `D`.
        heads: query heads `H`; one head has full rank, `r = D`.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, see `structattn.layers.choices.head_scale`.
        options: see `ProjectedAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        scale: HeadScale = "1/sqrt(r)",
        **options: Unpack[LayerOptions],
    ) -> None:
        head_dim = width_per_head(dim, heads, head_dim)
        self_scale = head_scale(scale, head_dim)
        super().__init__(dim, heads, (head_dim,), head_dim, **options)
        self.scale = self_scale

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
        return dense_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            scale=self.scale,
            key_start=key_start,
            key_end=key_end,
            query_offset=query_offset,
            dropout_p=self._dropout_p(),
        )

    def key_numbers(self, length: int) -> int:
        """`T · r` for each key head."""
        return self.kv_heads * length * self.head_dim

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Scores and mixing of values over visible pairs."""
        flat = Hierarchy.flat(self.head_dim)
        causal = self.is_causal and not dense
        return flops.attention(flat, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal)
