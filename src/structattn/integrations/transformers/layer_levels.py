"""Levels of one attention layer and the dimensions that each owns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structattn.integrations.transformers.pairs import Pairing, unit_dimensions
from structattn.ops.hierarchy import Hierarchy

_SERIALS = itertools.count()


class LayerLevels(nn.Module):
    """A hierarchy, and the permutation of dimensions to its levels.

    Without an order dimensions stay in place, except that several levels need the two dimensions of a rotary pair side
    by side. Dimensions of values always stay in place: the output projection reads them there.

    Args:
        hierarchy: the levels.
        pairing: how the rotary embedding pairs dimensions; None without one.
        order: for each key head (or once for all) the pairs, or without rotation the dimensions, in the order in which
            levels take them.
        width: width of a head.
        key_heads: key heads of the layer.
        name: name of the layer, for errors.

    Attributes:
        index: `(1 or Hkv, r)`, the source dimension of each place; None where all stay in place.
        serial: a number that no other `LayerLevels` has.

    Raises:
        ValueError: ranks or value ranks do not sum to the width, a level would own half a pair, or an order is no
            permutation.
    """

    index: Tensor | None

    def __init__(
        self,
        hierarchy: Hierarchy,
        pairing: Pairing | None,
        order: Sequence[Sequence[int]] | None,
        *,
        width: int,
        key_heads: int,
        name: str,
    ) -> None:
        super().__init__()
        _check_hierarchy(hierarchy, pairing, width, name)
        units = unit_dimensions(pairing, width)
        index = None
        if order is not None:
            index = units[_check_order(order, len(units), key_heads, name)].flatten(1)
        elif hierarchy.levels > 1 and pairing == "halves":
            index = units.flatten()[None]
        self.hierarchy = hierarchy
        self._name = name
        self._within: dict[int, Hierarchy] = {}
        self.serial = next(_SERIALS)
        self.settings: Mapping[str, Any] | None = None
        self.register_buffer("index", index, persistent=False)

    def arrange(self, x: Tensor) -> Tensor:
        """Permute dimensions of queries or keys `(B, H, T, r)` to the levels' order."""
        if self.index is None:
            return x
        if len(self.index) == 1:
            return x.index_select(-1, self.index[0])
        index = self.index.repeat_interleave(x.shape[1] // len(self.index), dim=0)
        return x.gather(-1, index[:, None].expand(x.shape))

    def within(self, window: int | None) -> Hierarchy:
        """Return the hierarchy inside the layer's native window; None is no window.

        Raises:
            ValueError: several levels by block, whose blocks have no place in a window that moves.
        """
        if window is None:
            return self.hierarchy
        if window not in self._within:
            if self.hierarchy.levels > 1 and not self.hierarchy.by_window:
                raise ValueError(
                    f"{self._name} has a window of {window} tokens, in which levels by block ({self.hierarchy}) cannot "
                    "lie: use levels by window, or turn the window off in the model's config (`sliding_window=None`)"
                )
            self._within[window] = self.hierarchy.within(window)
        return self._within[window]

    def extra_repr(self) -> str:
        """Return the hierarchy's text form."""
        return str(self.hierarchy)


def _check_hierarchy(hierarchy: Hierarchy, pairing: Pairing | None, width: int, name: str) -> None:
    ranks = "|".join(map(str, hierarchy.ranks))
    if hierarchy.rank != width:
        raise ValueError(
            f"hierarchy's ranks must sum to the head width {width} of {name}, got {ranks} = {hierarchy.rank}"
        )
    if hierarchy.value_ranks is not None and sum(hierarchy.value_ranks) != width:
        raise ValueError(
            f"hierarchy's value ranks must sum to the head width {width} of {name}, "
            f"got {'|'.join(map(str, hierarchy.value_ranks))} = {sum(hierarchy.value_ranks)}"
        )
    for level, rank in enumerate(hierarchy.ranks, start=1):
        if pairing is not None and rank % 2:
            raise ValueError(
                f"hierarchy's ranks must be even at {name}, whose rotary embedding rotates pairs of dimensions; "
                f"got rank {rank} at level {level} of {ranks}"
            )


def _check_order(order: object, units: int, key_heads: int, name: str) -> Tensor:
    """Return the permutations as a tensor `(1 or Hkv, units)`."""
    if isinstance(order, str) or not isinstance(order, Sequence) or not order:
        raise TypeError(f"order at {name} must be lists of integers, one for each key head, got {order!r}")
    if len(order) not in (1, key_heads):
        raise ValueError(f"order at {name} must have one list for each of {key_heads} key heads, got {len(order)}")
    for head, permutation in enumerate(order):
        if not isinstance(permutation, Sequence) or sorted(permutation) != list(range(units)):
            raise ValueError(
                f"order at {name} must hold each of 0 … {units - 1} once for key head {head}, got {permutation}"
            )
    return torch.tensor(order)
