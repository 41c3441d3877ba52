"""Choose a hierarchy for each layer by what the model loses with it.

Layers differ: some lose little with a short window, a few hold what copies from far away. So each layer is measured
alone with each candidate, and the candidates are chosen together under one budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structattn.integrations.transformers import set_hierarchy
from structattn.ops.hierarchy import Hierarchy
from structattn.retrofit.cache_methods import Calibrated
from structattn.retrofit.distillation import divergence

_STRIDE = 4
"""Every so manieth token of a window is predicted: read-outs of large vocabularies cost most."""
_PARTS = 1000
"""Parts of a whole layer's cache in which the budget is counted."""


def candidates_of(width: int, length: int, sinks: int, more: Sequence[Hierarchy] = ()) -> list[Hierarchy]:
    """Return the hierarchies to choose from.

    They are the whole layer, first, sliding windows of a 32nd, an 8th and a quarter of the length, and `more`. All but
    the first have sinks.
    """
    sizes = [max(length // part, sinks + 1) for part in (32, 8, 4)]
    windows = [Hierarchy((width,), windows=(size,), sinks=sinks) for size in dict.fromkeys(sizes)]
    levels = [
        Hierarchy(each.ranks, None, each.gains, windows=each.sizes, value_ranks=each.value_ranks, sinks=sinks)
        for each in more
    ]
    return [Hierarchy.flat(width), *windows, *levels]


@torch.no_grad()
def layer_divergences(
    calibrated: Calibrated,
    candidates: Sequence[Hierarchy],
    windows: Sequence[Tensor],
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the divergence from the model as it was with one layer changed, `(layers, candidates)`.

    It is the mean Kullback-Leibler divergence of predicted tokens, in nats.

    Args:
        calibrated: the model.
        candidates: hierarchies; the first is the whole layer, whose divergence is 0.
        windows: token ids `(B, T)`.
        report: called with the number of finished measurements and that of all.
    """
    layers, whole = calibrated.layers, candidates[0]
    kept = torch.arange(_STRIDE - 1, windows[0].shape[1], _STRIDE)
    targets = [_logits(calibrated.model, window, kept) for window in windows]
    found = torch.zeros(len(layers), len(candidates), dtype=torch.float64)
    for column, candidate in enumerate(candidates[1:], start=1):
        model, order = calibrated.arranged([candidate] * len(layers))
        for row in range(len(layers)):
            chosen = [candidate if layer.index == row else whole for layer in layers]
            set_hierarchy(model, chosen, order=order)
            losses = [
                divergence(_logits(model, window, kept), target).mean()
                for window, target in zip(windows, targets, strict=True)
            ]
            found[row, column] = torch.stack(losses).double().mean()
            if report:
                report((column - 1) * len(layers) + row + 1, (len(candidates) - 1) * len(layers))
    return found


def _logits(model: Callable[..., Any], window: Tensor, kept: Tensor) -> Tensor:
    """Return the logits of the kept tokens of every row, `(B · kept, V)`."""
    logits: Tensor = model(window, use_cache=False, logits_to_keep=kept).logits
    return logits.flatten(0, 1)


def choose(divergences: Tensor, shares: Tensor, budget: float) -> list[int]:
    """Return the candidate of each layer with the least sum of divergences within the budget.

    Divergences of layers are taken to add up. The sum over layers is exact, by dynamic programming over shares that
    are rounded up to a thousandth.

    Args:
        divergences: `(layers, candidates)`.
        shares: cache of each candidate as a share of the whole layer's, `(candidates,)`.
        budget: mean share of all layers.

    Raises:
        ValueError: the smallest candidates exceed the budget.
    """
    parts = [math.ceil(_PARTS * float(share) - 1e-9) for share in shares]
    most = math.floor(_PARTS * budget * len(divergences) + 1e-9)
    if min(parts) * len(divergences) > most:
        raise ValueError(
            f"cache must be at least {min(parts) / _PARTS:.1%}, the smallest that layers can have, got {budget:.1%}"
        )
    best, choices = np.zeros(most + 1), []
    for row in divergences.numpy():
        sums = np.stack([row[candidate] + _shifted(best, part) for candidate, part in enumerate(parts)])
        choices.append(sums.argmin(0))
        best = sums.min(0)
    left, chosen = most, []
    for choice in reversed(choices):
        chosen.append(int(choice[left]))
        left -= parts[chosen[-1]]
    return chosen[::-1]


def _shifted(best: NDArray[np.float64], parts: int) -> NDArray[np.float64]:
    """Return the least sums where so many parts are spent on one more layer; infinite where there are fewer."""
    return np.concatenate([np.full(min(parts, len(best)), np.inf), best[: max(len(best) - parts, 0)]])
