"""Standard attention: the same `r`-dimensional dot product for every pair."""

from __future__ import annotations

from torch import Tensor

from structattn.flops import Flops
from structattn.layers.projected import ScaledAttention
from structattn.ops.key_span import UNPADDED, KeySpan


class StandardAttention(ScaledAttention):
    """Multi-head attention: `out = softmax(scale · Q Kᵀ) V`.

    Args:
        dim: `D`.
        heads: query heads `H`; one head has full rank, `r = D`.
        head_dim: `r`, also the width of a value head; `D / H` by default.
        scale: factor on the scores, see `structattn.layers.choices.head_scale`.
        qk_norm: apply LayerNorm to each query and key head, see `ProjectedAttention`.
        options: see `LayerOptions`.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)`."""
        return self._attend_to_all(query, key, value, self.scale, span)

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the FLOPs of scores and mixing of values over visible pairs."""
        return self._dot_product_flops(self.head_dim, length, batch, dense)
