"""Find the pairs of dimensions that a rotary embedding rotates.

The score of a rotated pair depends on relative position alone, that of half a pair does not: a level must own whole
pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Pairing = Literal["halves", "neighbours"]
"""Pairs of a rotary embedding in a head of width `r`: `i` with `i + r/2`, or `2i` with `2i + 1`."""


def unit_dimensions(pairing: Pairing | None, width: int) -> Tensor:
    """Return the dimensions of each unit: `(r/2, 2)`; without rotation `(r, 1)`."""
    dimensions = torch.arange(width)
    if pairing is None:
        return dimensions[:, None]
    return dimensions.view(2, -1).T if pairing == "halves" else dimensions.view(-1, 2)


def rotates(model: nn.Module) -> bool:
    """Return True if the model has a rotary position embedding."""
    return getattr(model.config, "rope_parameters", None) is not None or bool(rates(model))


def rates(model: nn.Module) -> list[Tensor]:
    """Return angles per position `(r/2,)`, one tensor for each rotary embedding."""
    return [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


def find_pairing(model: nn.Module, attention: nn.Module, name: str, width: int) -> Pairing | None:
    """Return how a head's dimensions are paired; None without a rotary embedding.

    The pairs are read off the `rotate_half` of the attention's own file, applied to distinct numbers.

    Raises:
        ValueError: the pairs cannot be found, or not all dimensions are rotated.
    """
    if not rotates(model):
        return None
    turned = {2 * len(rate) for rate in rates(model)}
    if turned != {width}:
        part = " or ".join(map(str, sorted(turned))) or "an unknown number"
        raise ValueError(
            f"{name} has heads of width {width}, of which the rotary embedding rotates {part}: several levels need "
            "heads that are rotated as a whole"
        )
    rotate_half: Callable[[Tensor], Tensor] | None = getattr(
        sys.modules[type(attention).__module__], "rotate_half", None
    )
    places = torch.arange(width)
    if rotate_half is not None:
        partners = (rotate_half((places + 1.0)[None, None, None])[0, 0, 0].abs() - 1).long()
        for pairing in ("halves", "neighbours"):
            if torch.equal(partners, _partners(pairing, width)):
                return pairing
    raise ValueError(
        f"cannot tell which dimensions the rotary embedding of {name} ({type(attention).__name__}) pairs, "
        "so that levels cannot be given whole pairs"
    )


def _partners(pairing: Pairing, width: int) -> Tensor:
    """Return for each dimension the one it is paired with."""
    pairs = unit_dimensions(pairing, width)
    partners = torch.empty(width, dtype=torch.long)
    partners[pairs] = pairs.flip(1)
    return partners
