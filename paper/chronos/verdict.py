"""Compare loss and FLOPs of Chronos under MLR and standard attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from structattn.comparison.estimate import Estimate, above_zero
from structattn.comparison.numbers import format_estimate
from structattn.drawing.style import REFERENCE

Curve = Sequence[tuple[float, float]]
"""Training FLOPs and validation loss at every evaluation of a run."""


def chronos_verdict(curves: Mapping[tuple[str, int], Curve]) -> tuple[str, list[bool | None]]:
    """Compare runs with standard attention, seed by seed.

    Runs of one seed start from the same weights and read the same rows, so they have equal tokens.

    Args:
        curves: curve of each run, by structure and seed.

    Returns:
        The final losses in words. For each structure but standard attention: True if it saves compute, False if not,
        None if the runs cannot tell.
    """
    sentences, saves = [], []
    for structure in dict.fromkeys(name for name, _ in curves):
        pairs = [
            (curve, curves[REFERENCE, seed])
            for (name, seed), curve in curves.items()
            if name == structure and (REFERENCE, seed) in curves
        ]
        if not pairs:
            continue
        words = f"{structure} {format_estimate(Estimate.of([curve[-1][1] for curve, _ in pairs]))}"
        if structure != REFERENCE:
            shares = [flops_to_reach(curve, beside[-1][1]) / beside[-1][0] for curve, beside in pairs]
            if math.isfinite(max(shares)):
                share = Estimate.of([100 * each for each in shares])
                spread = "" if share.standard_error is None else f" ± {share.standard_error:.0f}"
                words += f", at {REFERENCE}'s loss after {share.mean:.0f}{spread}% of {REFERENCE}'s FLOPs"
                saves.append(above_zero(Estimate.of([1 - each for each in shares])))
            else:
                reached = sum(map(math.isfinite, shares))
                words += f", at {REFERENCE}'s loss with {reached} of {len(shares)} seeds"
                saves.append(None if reached else False)
        sentences.append(words)
    return "; ".join(sentences), saves


def flops_to_reach(curve: Curve, loss: float) -> float:
    """Return the training FLOPs at which a curve first reaches `loss`.

    Infinity if it never does. Losses between evaluations are interpolated.
    """
    for before, (flops, reached) in zip((None, *curve), curve, strict=False):
        if reached <= loss:
            if before is None:
                return flops
            return before[0] + (before[1] - loss) / (before[1] - reached) * (flops - before[0])
    return math.inf
