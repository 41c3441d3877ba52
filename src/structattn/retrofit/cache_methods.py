"""Ways to a smaller cache of keys and values, applied to a trained model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structattn.integrations.transformers import balance_values, far_energy, far_value_moments, set_hierarchy
from structattn.integrations.transformers.hierarchies import levels_of
from structattn.integrations.transformers.layers import DECODER, AttentionLayer, attention_layers
from structattn.ops.hierarchy import Hierarchy
from structattn.retrofit import quantisation
from structattn.retrofit.rivals import Attend, RoundedCache, SlidingWindow, UniformCut, use_rival


class Calibrated:
    """A trained model with standard attention, and what calibration text says of its keys and values.

    Args:
        model: causal model of transformers; it is not changed.
        batches: called for the batches of token ids `(B, T)` to measure on.
    """

    def __init__(self, model: PreTrainedModel, batches: Callable[[], list[Tensor]]) -> None:
        self.model, self._batches = model, batches
        self._energies: dict[int, list[Tensor]] = {}
        self._balanced: dict[int, PreTrainedModel] = {}

    @property
    def layers(self) -> list[AttentionLayer]:
        """The attention layers."""
        return attention_layers(self.model)[DECODER]

    def energy(self, distance: int) -> list[Tensor]:
        """Return the energy of each pair of dimensions in scores of tokens at least so far apart, see `far_energy`."""
        if distance not in self._energies:
            self._energies[distance] = far_energy(self.model, self._batches(), distance=distance)[DECODER]
        return self._energies[distance]

    def balanced(self, distance: int) -> PreTrainedModel:
        """Return a copy whose values are in the basis for tokens so far apart, see `balance_values`."""
        if distance not in self._balanced:
            changed = copy.deepcopy(self.model)
            balance_values(changed, far_value_moments(self.model, self._batches(), distance=distance))
            self._balanced[distance] = changed
        return copy.deepcopy(self._balanced[distance])

    def with_levels(self, hierarchy: Hierarchy, distance: int) -> PreTrainedModel:
        """Return a copy with MLR attention, its dimensions ordered by the energy of tokens so far apart."""
        model = self.balanced(distance)
        order = [layer.argsort(dim=-1, descending=True, stable=True).tolist() for layer in self.energy(distance)]
        set_hierarchy(model, hierarchy, order=order)
        return model


@dataclass(frozen=True)
class CacheMethod:
    """A way to a smaller cache. This class keeps everything: standard attention.

    Attributes:
        kind: name of the method in tables.
        tuned: True if it has weights to tune.
    """

    kind: str = field(default="standard", init=False)
    tuned: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """The method and its settings."""
        return self.kind

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy of the model with this method, before any tuning."""
        return copy.deepcopy(calibrated.model)

    def attach(self, model: PreTrainedModel) -> None:
        """Give a tuned model the attention of this method."""

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits of a layer's cache at `length` tokens, with 16 bits a whole number."""
        return quantisation.WHOLE_BITS * 2 * layer.width * layer.key_heads * length


@dataclass(frozen=True)
class Levels(CacheMethod):
    """Levels by window in keys and values: MLR attention."""

    hierarchy: Hierarchy
    kind: str = field(default="levels", init=False)
    tuned: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """The hierarchy's text form."""
        return str(self.hierarchy)

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy with the hierarchy, in the measured order and basis."""
        return calibrated.with_levels(self.hierarchy, quantisation.near_window(self.hierarchy))

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits of the numbers that later queries read."""
        return quantisation.WHOLE_BITS * layer.key_heads * self.hierarchy.cache_numbers(length, layer.width)


@dataclass(frozen=True)
class Rounded(CacheMethod):
    """Levels, or standard attention as one level, with a cache of a few bits.

    It is measured on the tuned model of its levels, and not tuned further.
    """

    hierarchy: Hierarchy
    bits: int
    kind: str = field(default="rounded", init=False)

    @property
    def name(self) -> str:
        """The hierarchy, unless it is one level, and the bits."""
        return f"int{self.bits}" if self.hierarchy.levels == 1 else f"{self.hierarchy}, int{self.bits}"

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy with a rounded cache."""
        if self.hierarchy.levels == 1:
            model = copy.deepcopy(calibrated.model)
            set_hierarchy(model, self.hierarchy)
        else:
            model = Levels(self.hierarchy).apply(calibrated)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Round the cache of a model that has the hierarchy."""
        layers = attention_layers(model)[DECODER]
        use_rival(model, [RoundedCache(levels_of(layer.module), self.bits) for layer in layers])

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits with scales and offsets; the nearest window is whole."""
        near = min(length, quantisation.near_window(self.hierarchy))
        values = self.hierarchy.value_widths(layer.width)
        far = self.hierarchy.levels - (self.hierarchy.levels > 1)
        keys = quantisation.key_bits(self.bits)
        bits = quantisation.WHOLE_BITS * 2.0 * layer.width * near
        for level in range(far):
            mixed = quantisation.value_bits(self.bits, values[level] * layer.key_heads)
            tokens = max(self.hierarchy.live(level, length) - near, 0)
            bits += (self.hierarchy.ranks[level] * keys + values[level] * mixed) * tokens
        return bits * layer.key_heads


@dataclass(frozen=True)
class Window(CacheMethod):
    """A sliding window with attention sinks."""

    window: int
    sinks: int
    kind: str = field(default="window", init=False)
    tuned: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """The window and the sinks."""
        return f"window {self.window} + {self.sinks}"

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy that sees the window and the sinks."""
        model = copy.deepcopy(calibrated.model)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Hide what the window does not show."""
        use_rival(model, [SlidingWindow(self.window, self.sinks)] * len(attention_layers(model)[DECODER]))

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits of the tokens that are seen."""
        return CacheMethod.cache_bits(self, layer, min(length, self.window + self.sinks))


@dataclass(frozen=True)
class Uniform(CacheMethod):
    """The same cut of keys and values for all tokens."""

    rank: int
    width: int
    kind: str = field(default="uniform", init=False)
    tuned: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """The dimensions kept of keys and values."""
        return f"uniform {self.rank} + {self.width}"

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy whose keys and values are cut, in the order and basis of all pairs of tokens."""
        model = calibrated.with_levels(Hierarchy.flat(calibrated.layers[0].width), 1)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Cut the keys and values of a model that has the order and the basis."""
        cuts: list[Attend] = [
            UniformCut(levels_of(layer.module), self.rank, self.width) for layer in attention_layers(model)[DECODER]
        ]
        use_rival(model, cuts)

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits of what is kept."""
        return quantisation.WHOLE_BITS * layer.key_heads * (self.rank + self.width) * length


def cache_share(method: CacheMethod, layers: Sequence[AttentionLayer], length: int) -> float:
    """Return a method's cache bits as a share of those of standard attention in 16 bits."""
    whole = CacheMethod()
    return sum(method.cache_bits(layer, length) for layer in layers) / sum(
        whole.cache_bits(layer, length) for layer in layers
    )


def rivals_of(levels: Levels, layers: Sequence[AttentionLayer], length: int, sinks: int) -> list[CacheMethod]:
    """Return a window and a uniform cut whose caches are as large as that of `levels`."""
    share, width = cache_share(levels, layers, length), layers[0].width
    kept = max(2, 2 * round(share * width / 2))
    return [Window(max(1, round(share * length) - sinks), sinks), Uniform(kept, kept)]


@torch.no_grad()
def token_losses(model: Any, windows: Iterable[Tensor]) -> Tensor:
    """Return the loss of each token but the first `(N, T - 1)`, in nats, of `N` windows `(T,)` read one by one."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        parts = zip(logits.split(1024), window[1:].split(1024), strict=True)
        losses.append(torch.cat([torch.nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in parts]))
    return torch.stack(losses)
