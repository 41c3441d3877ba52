"""Ways to a smaller cache of keys and values, applied to a trained model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structattn.integrations.transformers import balance_values, far_energy, far_value_moments, set_hierarchy
from structattn.integrations.transformers.hierarchies import levels_of
from structattn.integrations.transformers.layers import DECODER, AttentionLayer, attention_layers
from structattn.ops.hierarchy import Hierarchy
from structattn.retrofit import quantisation
from structattn.retrofit.rivals import Attend, RoundedCache, UniformCut, use_rival


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

    def arranged(self, hierarchies: Sequence[Hierarchy]) -> tuple[PreTrainedModel, list[Any]]:
        """Return a copy for hierarchies, one of each layer, with the order of dimensions for `set_hierarchy`.

        Where a layer has several levels, values get their basis, and keys their order by energy, for tokens beyond the
        nearest window of any layer.
        """
        near = [quantisation.near_window(each) for each in hierarchies if each.levels > 1]
        if not near:
            return copy.deepcopy(self.model), ["as_trained"] * len(hierarchies)
        order = [
            by_energy(energy) if hierarchy.levels > 1 else "as_trained"
            for energy, hierarchy in zip(self.energy(min(near)), hierarchies, strict=True)
        ]
        return self.balanced(min(near)), order


def by_energy(energy: Tensor) -> list[list[int]]:
    """Return each key head's pairs of dimensions, those of most energy first."""
    order: list[list[int]] = energy.argsort(dim=-1, descending=True, stable=True).tolist()
    return order


@dataclass(frozen=True)
class CacheMethod:
    """A way to a smaller cache. This class keeps everything: standard attention.

    Attributes:
        tuned: True if it has weights to tune.
    """

    tuned: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """Name of the method in tables."""
        return "standard"

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
    """MLR attention: levels by window in keys and values, or a sliding window with sinks.

    Args:
        hierarchies: one of all layers, or one for each.
        label: the name where layers differ.
    """

    hierarchies: tuple[Hierarchy, ...]
    label: str = ""
    tuned: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """`levels`, `window` or, where layers differ, `by layer`."""
        if len(set(self.hierarchies)) > 1:
            return "by layer"
        return "levels" if self.hierarchies[0].levels > 1 else "window"

    @property
    def name(self) -> str:
        """The text form of the hierarchy, or the label."""
        return self.label or str(self.hierarchies[0])

    def of(self, layer: AttentionLayer) -> Hierarchy:
        """Return the hierarchy of a layer."""
        return self.hierarchies[layer.index if len(self.hierarchies) > 1 else 0]

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy with the hierarchies, in the measured order and basis where there are several levels."""
        hierarchies = [self.of(layer) for layer in calibrated.layers]
        model, order = calibrated.arranged(hierarchies)
        set_hierarchy(model, hierarchies, order=order)
        return model

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits of the numbers that later queries read."""
        return quantisation.WHOLE_BITS * layer.key_heads * self.of(layer).cache_numbers(length, layer.width)


@dataclass(frozen=True)
class Rounded(CacheMethod):
    """Levels, or standard attention as one level, with a cache of a few bits.

    It is measured on the tuned model of its levels, and not tuned further.
    """

    levels: Levels
    bits: int

    @property
    def kind(self) -> str:
        """Name of the method in tables."""
        return "rounded"

    @property
    def name(self) -> str:
        """The levels, unless they are standard attention, and the bits."""
        return f"int{self.bits}" if self.is_standard else f"{self.levels.name}, int{self.bits}"

    @property
    def is_standard(self) -> bool:
        """True without levels, windows or sinks."""
        return all(each.levels == 1 and each.sizes == (None,) for each in self.levels.hierarchies)

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy with a rounded cache."""
        model = self.levels.apply(calibrated)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Round the cache of a model that has the hierarchy."""
        layers = attention_layers(model)[DECODER]
        use_rival(model, [RoundedCache(levels_of(layer.module), self.bits) for layer in layers])

    def cache_bits(self, layer: AttentionLayer, length: int) -> float:
        """Return the bits with scales and offsets; the nearest window and sinks are whole."""
        return layer.key_heads * quantisation.cache_bits(self.levels.of(layer), self.bits, layer, length)


@dataclass(frozen=True)
class Uniform(CacheMethod):
    """The same cut of keys and values for all tokens."""

    rank: int
    width: int
    tuned: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """Name of the method in tables."""
        return "uniform"

    @property
    def name(self) -> str:
        """The dimensions kept of keys and values."""
        return f"uniform {self.rank} + {self.width}"

    def apply(self, calibrated: Calibrated) -> PreTrainedModel:
        """Return a copy whose keys and values are cut, in the order and basis of all pairs of tokens."""
        model = calibrated.balanced(1)
        set_hierarchy(
            model, Hierarchy.flat(calibrated.layers[0].width), order=list(map(by_energy, calibrated.energy(1)))
        )
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


def rivals_of(levels: Levels, layers: Sequence[AttentionLayer], length: int, sinks: int) -> tuple[Levels, Uniform]:
    """Return a window and a uniform cut whose caches are as large as that of `levels`."""
    share, width = cache_share(levels, layers, length), layers[0].width
    kept = max(2, 2 * round(share * width / 2))
    window = Hierarchy((width,), windows=(max(sinks + 1, round(share * length) - sinks),), sinks=sinks)
    return Levels((window,)), Uniform(kept, kept)


@torch.no_grad()
def token_losses(model: Any, windows: Iterable[Tensor]) -> Tensor:
    """Return the loss of each token but the first `(N, T - 1)`, in nats, of `N` windows `(T,)` read one by one."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        parts = zip(logits.split(1024), window[1:].split(1024), strict=True)
        losses.append(torch.cat([torch.nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in parts]))
    return torch.stack(losses)
