"""Change the basis of values, so that far tokens need only the first dimensions.

Values have no rotation between their projection and the output projection, so every basis is free: for an invertible
`B` of each key head, `v' = B v` and `W_o' = W_o B⁻¹` leave the layer's output as it was. Far tokens then mix the first
dimensions alone, and the basis is chosen such that the others matter least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structattn import checks
from structattn.integrations.transformers.layers import DECODER, AttentionLayer, attention_layers
from structattn.integrations.transformers.statistics import Batches, LayerInputs, collect_statistics
from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy

_FLOOR = 1e-6
"""Smallest eigenvalue of what the output projection reads, as a share of the mean one."""
_PROJECTIONS = (("v_proj", "o_proj"), ("c_attn", "c_proj"))


def far_value_moments(
    model: PreTrainedModel, batches: Batches, *, distance: int | None = None
) -> dict[str, list[Tensor]]:
    r"""Return each layer's second moments of values mixed from far tokens.

    With the attention probabilities `p` of standard attention, the mean over queries `i` with a far key, and over the
    query heads of a key head, of `y_i y_iᵀ`, where::

        y_i = Σ_{j : i - j >= distance} p_ij v_j

    Args:
        model: runs in evaluation mode with standard attention; it is not changed.
        batches: token ids `(B, T)`, or the model's keyword arguments, or an iterable of either.
        distance: the least distance of far tokens, at least 1; half of the batch's length by default.

    Returns:
        By stack, for each layer, `(Hkv, dv, dv)` in float64 on the CPU.

    Raises:
        TypeError, ValueError: bad arguments, no tokens that far apart, an encoder, or a model whose layers cannot be
            found.
    """
    if distance is not None:
        checks.positive_int("distance", distance)
    stacks = attention_layers(model)
    if set(stacks) != {DECODER}:
        raise ValueError(f"model must be a causal decoder, got {type(model).__name__} with an encoder")
    sums = {id(layer.module): _FarValues(distance) for layers in stacks.values() for layer in layers}
    collect_statistics(model, sums, batches)
    return {stack: [sums[id(layer.module)].mean(layer.name) for layer in layers] for stack, layers in stacks.items()}


@dataclass
class _FarValues:
    """Sum of one layer's moments.

    Attributes:
        distance: see `far_value_moments`.
        total: `(Hkv, dv, dv)`; None before the first batch.
        queries: number of queries with a far key, times the query heads of a key head.
    """

    distance: int | None
    total: Tensor | None = None
    queries: int = 0

    def add(self, inputs: LayerInputs) -> None:
        """Add a batch, see `LayerStatistics`."""
        length, key_heads = inputs.key.shape[2], inputs.key.shape[1]
        distance = -(-length // 2) if self.distance is None else self.distance
        real = inputs.real
        far = F.pad(real.cumsum(1)[:, : max(length - distance, 0)], (min(distance, length), 0)) > 0
        counted = (far & real)[:, None, :, None]
        mixed = torch.where(counted, _mixed_from_far(inputs, distance), 0.0).double().unflatten(1, (key_heads, -1))
        total = torch.einsum("bhgti,bhgtj->hij", mixed, mixed).cpu()
        self.total = total if self.total is None else self.total + total
        self.queries += int(counted.sum()) * mixed.shape[2]

    def mean(self, name: str) -> Tensor:
        """Return the mean moments; ValueError if no tokens were far apart."""
        if self.total is None or not self.queries:
            raise ValueError(f"batches must hold tokens at least distance = {self.distance} apart, got none at {name}")
        return self.total / self.queries


def _mixed_from_far(inputs: LayerInputs, distance: int) -> Tensor:
    """Return the values mixed from far tokens, `(B, Hq, T, dv)`.

    Values stand there twice, for all pairs and for near ones. A level must have a dimension of keys, which is zero.
    """
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key, value = (each.to(dtype) for each in (inputs.query, inputs.key, inputs.value))
    rank, width = query.shape[3], value.shape[3]
    both = mlr_attention(
        F.pad(query, (0, 1)),
        F.pad(key, (0, 1)),
        torch.cat([value, value], dim=3),
        Hierarchy((rank, 1), windows=(None, distance), value_ranks=(width, width)),
        is_causal=True,
        scale=inputs.scale,
        attn_bias=None if bool(inputs.real.all()) else _mask_bias(inputs.real).to(dtype),
        enable_gqa=True,
    )
    return both[..., :width] - both[..., width:]


def _mask_bias(real: Tensor) -> Tensor:
    return torch.zeros(real.shape, device=real.device).masked_fill(~real, float("-inf"))[:, None, None]


@torch.no_grad()
def balance_values(model: PreTrainedModel, moments: Mapping[str, Sequence[Tensor]]) -> None:
    """Change the basis of each key head's values in place; the model's outputs stay the same.

    With `C` the moments of far-mixed values and `G = Σ_h W_hᵀ W_h` what the output projection reads of them, over the
    query heads `h` of the key head, the basis is::

        G^{1/2} C G^{1/2} = U Σ Uᵀ        B = Uᵀ G^{1/2}

    largest first. If all its query heads mixed alike, keeping `n` dimensions for far tokens would change the output by
    `Σ_{d >= n} σ_d`, the least of all bases.

    Args:
        model: projects values and outputs by `v_proj` and `o_proj` (Llama, Qwen, Mistral, Gemma), or `c_attn` and
            `c_proj` (GPT-2).
        moments: from `far_value_moments`.

    Raises:
        ValueError: before anything is changed: the model has other projections, or `moments` are those of another
            model.
    """
    found = attention_layers(model)
    if found.keys() != moments.keys() or any(len(found[stack]) != len(moments[stack]) for stack in found):
        raise ValueError("moments must be of this model, one for each attention layer: see far_value_moments")
    pairs = [pair for stack in found for pair in zip(found[stack], moments[stack], strict=True)]
    weights = value_weights(model)
    for (layer, moment), each in zip(pairs, weights, strict=True):
        expected = (layer.key_heads, each.value.shape[1], each.value.shape[1])
        if moment.shape != expected:
            raise ValueError(f"moments of {layer.name} must be {expected}, got {tuple(moment.shape)}")
    for (_, moment), each in zip(pairs, weights, strict=True):
        each.change_basis(moment)


def value_weights(model: PreTrainedModel) -> list[ValueWeights]:
    """Return the weights of values and outputs of each attention layer.

    Raises:
        ValueError: a layer has other projections than `balance_values` serves.
    """
    return [_weights(layer) for layers in attention_layers(model).values() for layer in layers]


@dataclass
class ValueWeights:
    """Views of the weights that make one layer's values and read what was mixed of them.

    Attributes:
        value: `(Hkv, dv, D)`.
        bias: `(Hkv, dv)`; None without one.
        output: `(D, Hkv, Hq / Hkv, dv)`.
    """

    value: Tensor
    bias: Tensor | None
    output: Tensor

    def change_basis(self, moment: Tensor) -> None:
        """Apply the basis of `balance_values` in float64."""
        output, moment = self.output.double(), moment.to(self.output.device)
        root, inverse = _roots(torch.einsum("ehgi,ehgj->hij", output, output))
        _, vectors = torch.linalg.eigh(root @ moment @ root)
        vectors = vectors.flip(-1)  # largest first
        basis, back = vectors.mT @ root, inverse @ vectors
        self.value.copy_(basis @ self.value.double())
        if self.bias is not None:
            self.bias.copy_((basis @ self.bias.double().unsqueeze(-1)).squeeze(-1))
        self.output.copy_(torch.einsum("ehgi,hij->ehgj", output, back))


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of symmetric matrices, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=_FLOOR * values.mean(-1, keepdim=True)).sqrt().unsqueeze(-2)
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


def _weights(layer: AttentionLayer) -> ValueWeights:
    """Return a layer's weights by head; ValueError where its projections are of an unknown kind."""
    for names in _PROJECTIONS:
        value, output = (getattr(layer.module, name, None) for name in names)
        if isinstance(value, nn.Linear) and isinstance(output, nn.Linear):
            made, bias, read = value.weight, value.bias, output.weight
        elif isinstance(value, Conv1D) and isinstance(output, Conv1D):
            start = value.nf // 3 * 2  # queries, keys and values stand side by side
            made, bias, read = value.weight[:, start:].T, value.bias[start:], output.weight.T
        else:
            continue
        if made.shape[0] % layer.key_heads == 0 and read.shape[1] % made.shape[0] == 0:
            heads = (layer.key_heads, made.shape[0] // layer.key_heads)
            return ValueWeights(
                made.unflatten(0, heads),
                None if bias is None else bias.unflatten(0, heads),
                read.unflatten(1, (layer.key_heads, -1, heads[1])),
            )
    raise ValueError(
        f"{layer.name} ({type(layer.module).__name__}) does not project values and outputs by "
        "v_proj and o_proj or c_attn and c_proj: a change of basis cannot be folded into its weights"
    )
