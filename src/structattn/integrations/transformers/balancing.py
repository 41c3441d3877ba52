"""Balance heads: their first dimensions carry the most energy.

Without a rotary embedding, any invertible maps `q' = A q`, `k' = B (k - μ)` with `Aᵀ B = I` change a query's scores
by one number only, which softmax does not see (`structattn.layers.head_basis`). With `q = W_q x + b_q` the maps become
new weights and biases, `A W_q`, `A b_q` and `B W_k`, `B (b_k - μ)`, so that the model costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structattn import checks
from structattn.integrations.transformers.layers import AttentionLayer, attention_layers
from structattn.integrations.transformers.pairs import rotates
from structattn.integrations.transformers.statistics import Batches, LayerInputs, collect_statistics
from structattn.layers.head_basis import Moments, MomentSums, balancing_maps


def far_moments(model: PreTrainedModel, batches: Batches, *, distance: int | None = None) -> dict[str, list[Moments]]:
    """Return each layer's second moments of queries and keys, far pairs only.

    A query counts once for each key at least `distance` before it, a key once for each query at least `distance` after
    it. An encoder counts both directions.

    Args:
        model: runs in evaluation mode with standard attention; it is not changed.
        batches: token ids `(B, T)`, or the model's keyword arguments, or an iterable of either.
        distance: the least distance of far tokens, at least 1; half of the batch's length by default.

    Returns:
        By stack, a list with the moments of each layer.

    Raises:
        TypeError, ValueError: bad arguments, no tokens that far apart, or a model whose layers cannot be found.
    """
    if distance is not None:
        checks.positive_int("distance", distance)
    stacks = attention_layers(model)
    moments = {id(layer.module): _FarMoments(distance) for layers in stacks.values() for layer in layers}
    collect_statistics(model, moments, batches)
    return {stack: [moments[id(layer.module)].sums.moments() for layer in layers] for stack, layers in stacks.items()}


class _FarMoments:
    """Moments of one layer over pairs of far tokens."""

    def __init__(self, distance: int | None) -> None:
        self.distance, self.sums = distance, MomentSums()

    def add(self, inputs: LayerInputs) -> None:
        """Add a batch, see `LayerStatistics`."""
        real = inputs.real
        distance = -(-real.shape[1] // 2) if self.distance is None else self.distance
        behind, ahead = _far_tokens(real, distance), _far_tokens(real.flip(1), distance).flip(1)
        as_query, as_key = (behind, ahead) if inputs.is_causal else (behind + ahead, behind + ahead)
        self.sums.add(inputs.query, inputs.key, as_query * real, as_key * real)


def _far_tokens(real: Tensor, distance: int) -> Tensor:
    """Return `(B, T)`, the number of real tokens at least `distance` before each."""
    reach = min(distance, real.shape[1])
    return F.pad(real.cumsum(1)[:, : real.shape[1] - reach], (reach, 0))


@torch.no_grad()
def balance(model: PreTrainedModel, moments: Mapping[str, Sequence[Moments]]) -> None:
    """Change each head's basis in place by score energy.

    Its first dimensions then carry the most.

    The model's outputs stay the same. `set_hierarchy(model, hierarchy)` then lets far tokens see the first dimensions.
    Attention must be as in GPT-2: learned positions, and queries, keys and values projected by one `c_attn`. Under a
    rotary embedding only the order of pairs is free: see `measure_order`.

    Args:
        model: its weights and biases are changed.
        moments: from `far_moments`.

    Raises:
        ValueError: before anything is changed: the model has a rotary embedding or another projection, or `moments`
            are those of another model.
    """
    found = attention_layers(model)
    if found.keys() != moments.keys() or any(len(found[stack]) != len(moments[stack]) for stack in found):
        raise ValueError("moments must be of this model, one for each attention layer: see far_moments")
    layers = [layer for stack in found for layer in found[stack]]
    each = [moment for stack in found for moment in moments[stack]]
    projections = [query_key_projection(model, layer) for layer in layers]
    for layer, moment in zip(layers, each, strict=True):
        expected = (layer.key_heads, layer.width, layer.width)
        if moment.query.shape != expected:
            raise ValueError(f"moments of {layer.name} must be {expected}, got {tuple(moment.query.shape)}")
    for projection, moment in zip(projections, each, strict=True):
        query, key, _ = balancing_maps(moment.query, moment.key)
        _fold(projection, 0, query, torch.zeros_like(moment.mean))
        _fold(projection, 1, key, moment.mean)


def query_key_projection(model: PreTrainedModel, layer: AttentionLayer) -> Conv1D:
    """Return the projection to a layer's queries, keys and values.

    Raises:
        ValueError: there is none, or a rotary embedding follows it.
    """
    if rotates(model):
        raise ValueError(
            f"{layer.name} has a rotary embedding, under which only the order of its pairs is free: measure_order"
        )
    projection = getattr(layer.module, "c_attn", None)
    if not isinstance(projection, Conv1D) or projection.nf != 3 * layer.key_heads * layer.width:
        raise ValueError(
            f"{layer.name} ({type(layer.module).__name__}) does not project queries, keys and values by one `c_attn` "
            "as GPT-2 does: a change of basis cannot be folded into its weights"
        )
    return projection


def _fold(projection: Conv1D, part: int, maps: Tensor, mean: Tensor) -> None:
    """Make part 0 (queries) or 1 (keys) of a projection give `maps (x - mean)` for `x`, in float64."""
    heads, width, _ = maps.shape
    columns = slice(part * heads * width, (part + 1) * heads * width)
    weight, bias = projection.weight[:, columns], projection.bias[columns]  # (D, H·r), (H·r)
    maps, mean = maps.to(weight.device), mean.to(weight.device)
    mapped = torch.einsum("dhi,hji->dhj", weight.double().unflatten(1, (heads, width)), maps)
    weight.copy_(mapped.flatten(1))
    bias.copy_(torch.einsum("hi,hji->hj", bias.double().unflatten(0, (heads, width)) - mean, maps).flatten())
