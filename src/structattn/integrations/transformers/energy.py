"""Measure the energy of far tokens' scores, dimension by dimension.

Queries and keys come from calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structattn import checks
from structattn.integrations.transformers.layers import attention_layers
from structattn.integrations.transformers.pairs import find_pairing, unit_dimensions
from structattn.integrations.transformers.statistics import Batches, LayerInputs, collect_statistics


def measure_order(model: PreTrainedModel, batches: Batches, *, distance: int | None = None) -> dict[str, list[Any]]:
    """Return an order of dimensions by their energy in far scores.

    Args:
        model: with any attention implementation; it is not changed.
        batches: see `far_energy`.
        distance: see `far_energy`.

    Returns:
        By stack, for each layer and key head, the pairs (without a rotary embedding, the dimensions), largest energy
        first.

    Raises:
        TypeError, ValueError: see `far_energy`.
    """
    energy = far_energy(model, batches, distance=distance)
    return {
        stack: [layer.argsort(dim=-1, descending=True, stable=True).tolist() for layer in layers]
        for stack, layers in energy.items()
    }


def far_energy(model: PreTrainedModel, batches: Batches, *, distance: int | None = None) -> dict[str, list[Tensor]]:
    r"""Return the mean energy of each pair of dimensions in scores of far tokens.

    In standard attention, the pair `p` has::

        e_p = mean over i, j with i - j >= distance of (q_i[p] · (k_j[p] - k̄[p]))²

    `k̄` is the mean key of the sequence, which softmax does not see. An encoder counts `|i - j| >= distance`. Under a
    rotary embedding `p` is a pair of dimensions, after rotation; without one it is a dimension. Computed exactly from
    running second moments, in memory linear in the number of tokens.

    Args:
        model: runs in evaluation mode with standard attention; it is not changed.
        batches: token ids `(B, T)`, or the model's keyword arguments (`input_ids`, `attention_mask`, `labels`, …), or
            an iterable of either.
        distance: the least distance of far tokens, at least 1; half of the batch's length by default.

    Returns:
        By stack, for each layer, `(Hkv, r/2)` or `(Hkv, r)` in float64, the mean over the query heads of a key head.

    Raises:
        TypeError, ValueError: bad arguments, no tokens that far apart, or a model whose layers or pairs cannot be
            found.
    """
    if distance is not None:
        checks.positive_int("distance", distance)
    stacks = attention_layers(model)
    energies: dict[int, _FarEnergy] = {}
    for layer in (layer for layers in stacks.values() for layer in layers):
        pairing = find_pairing(model, layer.module, layer.name, layer.width)
        energies[id(layer.module)] = _FarEnergy(unit_dimensions(pairing, layer.width), distance)
    collect_statistics(model, energies, batches)
    return {
        stack: [energies[id(layer.module)].mean(layer.name) for layer in layers] for stack, layers in stacks.items()
    }


@dataclass
class _FarEnergy:
    """Sum of one layer's energy over pairs of far tokens.

    Attributes:
        units: dimensions of each pair, from `unit_dimensions`.
        distance: see `far_energy`.
        energy: `(Hkv, units)`, the sum; None before the first batch.
        pairs: number of pairs of tokens, times the query heads of a key head.
    """

    units: Tensor
    distance: int | None
    energy: Tensor | None = None
    pairs: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, inputs: LayerInputs) -> None:
        """Add a batch, see `LayerStatistics`."""
        query, key, real = inputs.query, inputs.key, inputs.real
        length, heads = key.shape[2], key.shape[1]
        distance = -(-length // 2) if self.distance is None else self.distance
        weight = real.to(torch.float64)[:, None, :, None]  # (B, 1, T, 1)
        key = key.double()
        key = (key - (key * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)) * weight
        query = (query.double() * weight).unflatten(1, (heads, -1))  # (B, Hkv, Hq / Hkv, T, r)
        units = self.units.to(key.device)
        key, query = key[..., units], query[..., units]  # (…, T, units, 1 or 2)
        moments = key[..., :, None] * key[..., None, :]  # (B, Hkv, T, units, w, w)
        counts = weight[:, 0, :, 0]
        energy, pairs = _far(query, moments, counts, distance)
        if not inputs.is_causal:
            behind = _far(query.flip(3), moments.flip(2), counts.flip(1), distance)
            energy, pairs = energy + behind[0], pairs + behind[1]
        self.energy = energy if self.energy is None else self.energy + energy
        self.pairs = self.pairs.to(pairs.device) + pairs * query.shape[2]

    def mean(self, name: str) -> Tensor:
        """Return the mean energy `(Hkv, units)`; ValueError if no tokens were far apart."""
        if self.energy is None or not bool(self.pairs):
            raise ValueError(f"batches must hold tokens at least distance = {self.distance} apart, got none at {name}")
        return self.energy / self.pairs


def _far(query: Tensor, moments: Tensor, counts: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Return the energy `(Hkv, units)` of far pairs, query after key, and their number."""
    length = moments.shape[2]
    if distance >= length:
        return moments.new_zeros(moments.shape[1], moments.shape[3]), counts.new_zeros(())
    before = moments.cumsum(2)[:, :, : length - distance]  # keys far before the query `distance` later
    late = query[..., distance:, :, :]
    energy = torch.einsum("bhgtui,bhtuij,bhgtuj->hu", late, before, late)
    return energy, (counts.cumsum(1)[:, : length - distance] * counts[:, distance:]).sum()
