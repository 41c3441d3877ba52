"""Loss of language models of several widths against training compute (figure 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paper.axes import authors_flops, visible_pair_flops
from paper.drawing import draw_estimates
from paper.evidence import (
    all_true,
    describe_resolution,
    estimates,
    estimates_by,
    is_lower,
    label_values,
    ranked,
    with_label,
)
from paper.language import LOSS, TEXT, mlr_unscaled, preset_trial
from paper.laws import PowerLaw
from paper.study import Finding, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.drawing.style import REFERENCE, TRAINING_FLOPS, new_figure, pens, styled
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.training import Preset, preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = "mlr+paper"
_UNSCALED = mlr_unscaled()


class Scaling(Study):
    """Figure 4: loss against training compute."""

    name = "scaling"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": "Models of 4 layers and widths 64 to 128 on 256 characters of context, for 2e12 to 1e13 FLOPs.",
        "paper": "Models of 6 layers and widths 256 to 768 on 1,024 characters of context, 20 tokens per parameter.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train every structure at every width.

        The budget grows with the parameters.
        """
        if scale == "paper":
            structures = ("standard", _PAPER, _UNSCALED, "swa:128", "gswa:128|32")
        else:
            structures = ("standard", _PAPER, _UNSCALED, "swa:64", "gswa:64|16")
        trials = [
            preset_trial(name, data, row, {"budget": row.flops}) for row in _presets(scale) for name in structures
        ]
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot loss against compute, with power laws and their bands."""
        with styled():
            figure = new_figure(7.4, 3.6)
            axes = figure.add_subplot()
            names = [str(name) for name in label_values(outcomes, "structure")]
            lines = {name: estimates_by(outcomes, "budget", structure=name) for name in names}
            draw_estimates(axes, lines)
            for name, pen in pens(names).items():
                law = _fit_law(outcomes, name)
                if law is not None:
                    span = np.geomspace(lines[name][0][0], lines[name][-1][0], 40)
                    axes.fill_between(span, *law.band(span), color=pen.colour, alpha=0.12, linewidth=0)
            axes.set(xlabel=TRAINING_FLOPS, ylabel=LOSS, xscale="log", yscale="log")
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Return the cost of each structure by both counts of `paper.axes`, and what the other count is worth.

        At equal compute on the authors' axis a structure would take other numbers of steps; the fitted law says what
        they do to the loss, relative to standard attention.
        """
        lines = [
            "| width | structure | FLOPs of a row over standard attention's, visible pairs | authors' count | worth of "
            "the authors' count, nats |",
            "|---|---|---|---|---|",
        ]
        presets = {row.dim: row for scale in self.scales for row in _presets(scale)}
        table = estimates(outcomes, "width", "structure")
        for (width, structure), loss in table.items():
            name, law = str(structure), _fit_law(outcomes, str(structure))
            row = presets[int(width)]
            ours, theirs = (
                count(_model(name, row), row.context_length) / count(_model(REFERENCE, row), row.context_length)
                for count in (visible_pair_flops, authors_flops)
            )
            worth = "" if law is None else f"{law.exponent * loss.mean * math.log(theirs / ours):+.3f}"
            lines.append(f"| {width} | `{name.replace('|', ',')}` | {ours:.3f} | {theirs:.3f} | {worth} |")
        return "\n".join(lines)

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Rank structures at each budget; state the exponents."""
        table = estimates(outcomes, "budget", "structure")
        if not table:
            return Finding("No trial ended.")
        rankings, mlr_is_best = [], list[bool | None]()
        for budget in sorted({float(budget) for budget, _ in table}):
            losses = {str(name): each for (at, name), each in table.items() if at == budget}
            rankings.append(f"Loss at {budget:.2g} FLOPs: {ranked(losses)}.")
            mlr_is_best += _mlr_is_best(losses)
        statement = f"{' '.join(rankings)} {describe_resolution(table.values())}"
        exponents = [
            f"{name} {law.exponent:.3f} ({law.interval[0]:.3f} to {law.interval[1]:.3f})"
            for name in label_values(outcomes, "structure")
            if (law := _fit_law(outcomes, str(name))) is not None
        ]
        if exponents:
            statement += f" Exponent a of loss ~ compute^-a, with its 95% interval: {', '.join(exponents)}."
        return Finding(statement, all_true(mlr_is_best))


def _presets(scale: Scale) -> list[Preset]:
    """Return one model for each width, with its budget."""
    if scale == "paper":
        return [preset(f"paper-{dim}") for dim in (256, 384, 512, 768)]
    demo = dataclasses.replace(preset("demo"), learning_rate=3e-3)
    budgets = {64: 2e12, 96: 5e12, 128: 1e13}
    return [dataclasses.replace(demo, dim=dim, heads=dim // 32, flops=flops) for dim, flops in budgets.items()]


def _model(structure: str, row: Preset) -> LanguageModel:
    """Return an untrained model, to count its FLOPs."""
    return LanguageModel(LanguageModelConfig(attention=structure, **row.sizes()))


def _mlr_is_best(losses: Mapping[str, Estimate]) -> list[bool | None]:
    """Compare the paper's MLR attention with every other structure; None if it is missing."""
    if _PAPER not in losses:
        return [None]
    others = [each for name, each in losses.items() if name not in (_PAPER, _UNSCALED)]
    return [is_lower(losses[_PAPER], each, losses.values()) for each in others]


def _fit_law(outcomes: Sequence[Outcome], structure: str) -> PowerLaw | None:
    """Fit a structure's loss against compute.

    None if fewer than two budgets ended.
    """
    ended = [each for each in with_label(outcomes, structure=structure) if each.rows]
    budgets = [float(each.labels["budget"]) for each in ended]
    return PowerLaw.fit(budgets, [each.loss for each in ended]) if len(set(budgets)) > 1 else None
