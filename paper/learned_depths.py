"""Learn a gain or bias for each depth of MLR attention.

Scores are dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from structattn.comparison.run import RunConfig
from structattn.layers import MLRAttention
from structattn.models import StructuredModel
from structattn.ops.key_span import UNPADDED, KeySpan

Learned = Literal["gain", "bias"]


@dataclass(frozen=True)
class LearnedDepthRun(RunConfig):
    """Run whose MLR attention learns a number per head and depth."""

    learned: Learned = "bias"
    """`gain` multiplies the scores of a depth and starts at 1; `bias` is added to them and starts at 0."""

    def build_model(self) -> StructuredModel:
        """Return the untrained model.

        Its other weights are those of the run without the learned numbers.
        """
        model = super().build_model()
        for block in model.backbone.layers:
            block.attention = LearnedDepthAttention.of(cast(MLRAttention, block.attention), self.learned)
        return model


class LearnedDepthAttention(MLRAttention):
    """MLR attention with a gain or bias per head and depth.

    With `m` the depth of the pair and `h` the head: `score'(i, j) = gain[h, m] · score(i, j)`, or `score(i, j) +
    bias[h, m]`. It holds every score of a row, `T²` numbers for each head and level.
    """

    learned: Learned
    depths: nn.Parameter

    @classmethod
    def of(cls, layer: MLRAttention, learned: Learned) -> LearnedDepthAttention:
        """Return the layer with learned numbers; the layer given is used up."""
        layer.__class__ = cls
        changed = cast(LearnedDepthAttention, layer)
        changed.learned = learned
        # The model sets every parameter that is no matrix to 1, so the bias is this number minus 1.
        changed.depths = nn.Parameter(torch.ones(layer.heads, layer.hierarchy.levels))
        return changed

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, T, dv)` of whole unpadded rows."""
        if span.key_start is not None or span.key_end is not None or span.query_offset or not self.is_causal:
            raise ValueError("the dense form takes whole unpadded rows of a causal model")
        hierarchy, at = self.hierarchy, torch.arange(query.shape[2], device=query.device)
        i, j = at[:, None], at[None, :]
        reached = [hierarchy.reaches(level, i, j) & (j <= i) for level in range(hierarchy.levels)]
        parts = zip(query.split(hierarchy.ranks, -1), key.split(hierarchy.ranks, -1), reached, strict=True)
        scores = sum((q @ k.mT).float() * pairs for q, k, pairs in parts)
        number = self.depths[:, (hierarchy.depth(i, j) - 1).clamp(min=0)]
        scores = scores * number if self.learned == "gain" else scores + (number - 1)
        shares = torch.softmax(scores.masked_fill(~reached[0], -torch.inf), dim=-1)
        values = value.split(hierarchy.value_widths(self.value_dim), -1)
        mixed = [(shares * pairs).to(v.dtype) @ v for v, pairs in zip(values, reached, strict=True)]
        return torch.cat(mixed, -1)
