"""Loss of language models by the ranks of their levels (section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from paper.drawing import plot_estimates
from paper.evidence import describe_resolution, estimates, is_lower, ranked
from paper.language import LOSS, TEXT, mlr_unscaled, preset_trial
from paper.study import Finding, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.ops.hierarchy_text import parse_ranks
from structattn.training import preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RANKS_OF_THE_PAPER = ("32|8|6|4|4|4|4|2", "16|8|4|4")
"""The paper's ranks, and similar ones for heads of half the rank."""


class Ranks(Study):
    """Section 5: how to split a head's rank over the levels."""

    name = "ranks"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": "Models of 4 layers, width 128 and heads of 32 on 256 characters of context, for 5e12 FLOPs.",
        "paper": (
            "Models of 6 layers, width 512 and heads of 64 on 1,024 characters of context, 20 tokens per parameter."
        ),
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Vary the ranks, at standard scale."""
        if scale == "paper":
            row = preset("paper-512")
            splits: tuple[str, ...] = ("64", "32|32", "32|16|16", "32|8|6|4|4|4|4|2", "8x8", "2|2|4|4|4|8|8|32")
        else:
            row = dataclasses.replace(preset("demo"), flops=5e12, learning_rate=3e-3)
            splits = ("32", "16|16", "16|8|4|4", "8x4", "4|4|8|16", "2|2|4|24")
        return with_seeds([preset_trial(mlr_unscaled(split), data, row, {"ranks": split}) for split in splits], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the loss against the share of key numbers kept."""
        points = sorted((_key_share(ranks), each) for ranks, each in _losses(outcomes).items())
        xlabel = "share of key numbers kept when generating"
        return plot_estimates({"MLR attention": points}, xlabel=xlabel, ylabel=LOSS)

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Order the ranks by loss; compare the paper's ranks with one level."""
        losses = _losses(outcomes)
        if not losses:
            return Finding("No trial ended.")
        single_level = next((each for ranks, each in losses.items() if len(parse_ranks(ranks)) == 1), None)
        papers = next((losses[ranks] for ranks in _RANKS_OF_THE_PAPER if ranks in losses), None)
        agrees = None
        if single_level is not None and papers is not None:
            agrees = is_lower(papers, single_level, losses.values())
        return Finding(f"Loss by ranks, lowest first: {ranked(losses)}. {describe_resolution(losses.values())}", agrees)


def _losses(outcomes: Sequence[Outcome]) -> dict[str, Estimate]:
    """Return the mean final loss by ranks."""
    return {str(ranks): each for (ranks,), each in estimates(outcomes, "ranks").items()}


def _key_share(spelling: str) -> float:
    """Return the share of key numbers that full dyadic blocks keep.

    `Σ r_l / 2^{l-1}` over `Σ r_l`.
    """
    ranks = parse_ranks(spelling)
    return sum(rank / 2**level for level, rank in enumerate(ranks)) / sum(ranks)
