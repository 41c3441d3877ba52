"""Two counts of the compute of a language model, the axes of its figures.

*Visible pairs*, forward and backward, is the count of this package (`structattn.flops`): 2 FLOPs for a multiply-add,
only pairs that the causal mask and the windows let through, with the head.

*The authors' count* is that of the axis of figure 4 (`src/utils.py` and `src/model.py` of their code, whose name for
it is `non_emb_compute`): forward multiply-adds, each one FLOP, without the head. Hidden pairs count, values are mixed
over all pairs whatever the structure, a window of `w` multiplies `2w` keys, cut off at the ends of the row, and a norm
takes 5 FLOPs a number.
"""

from __future__ import annotations

from structattn.drawing.style import TRAINING_FLOPS
from structattn.layers import GlobalSlidingWindowAttention, MLRAttention, SlidingWindowAttention
from structattn.layers.projected import ProjectedAttention
from structattn.models import LanguageModel
from structattn.ops.hierarchy import Hierarchy

VISIBLE_PAIRS = TRAINING_FLOPS
AUTHORS = "FLOPs as the authors count (all pairs, forward)"
"""Labels of the two axes."""

_PER_NORMALISED_NUMBER = 5


def visible_pair_flops(model: LanguageModel, length: int) -> int:
    """Return the FLOPs of training on one row of `length` tokens, by this package's count."""
    return model.flops(length).training


def authors_flops(model: LanguageModel, length: int) -> int:
    """Return the FLOPs of one row of `length` tokens, by the authors' count.

    Levels by window and levels in values are not in their code. They count by the same rules: a window as theirs,
    values as if mixed whole.

    Raises:
        TypeError: a layer has no linear queries and keys.
    """
    total = _PER_NORMALISED_NUMBER * length * model.config.dim  # the last norm
    for block in model.backbone.layers:
        layer = block.attention
        if not isinstance(layer, ProjectedAttention):
            raise TypeError(f"the authors' count is of attention with linear queries and keys, got {layer!r}")
        matrices = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, block.mlp.expand, block.mlp.contract)
        normalised = 2 * model.config.dim
        if layer.q_norm is not None:
            normalised += (layer.heads + layer.kv_heads) * layer.head_dim
        scores = layer.heads * sum(
            rank * _multiplied_pairs(hierarchy, level, length)
            for hierarchy in _parts(layer)
            for level, rank in enumerate(hierarchy.ranks)
        )
        total += length * sum(each.weight.numel() for each in matrices)
        total += scores + layer.heads * layer.value_dim * length**2 + _PER_NORMALISED_NUMBER * length * normalised
    return total


def _parts(layer: ProjectedAttention) -> list[Hierarchy]:
    """Return the hierarchies whose scores a layer computes."""
    match layer:
        case MLRAttention() | SlidingWindowAttention():
            return [layer.hierarchy]
        case GlobalSlidingWindowAttention():
            return [Hierarchy.flat(layer.global_rank), layer.near_hierarchy]
    return [Hierarchy.flat(layer.head_dim)]


def _multiplied_pairs(hierarchy: Hierarchy, level: int, length: int) -> int:
    """Return the pairs that a level multiplies in the authors' code, hidden ones too."""
    size = hierarchy.sizes[level]
    if size is None or size >= length:
        return length**2
    if hierarchy.by_window:
        return sum(min(length, place + size) - max(0, place - size) for place in range(length))
    whole, rest = divmod(length, size)
    return whole * size**2 + rest**2
