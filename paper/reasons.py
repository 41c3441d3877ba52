"""Why the paper's form of MLR attention is behind after short trainings: one change at a time.

Its weights `1/r_l` and gains `1/m` start the logits several times smaller than those of standard attention, and only
the gains of the norms on queries and keys can make up for that. Each form here takes one cause away, or gives it to
standard attention.

*Rule, written before the first run.* The gap is the loss of `mlr+paper` minus that of `standard`, both with rotary
positions. A change *closes* a share of it: `mlr+paper` minus the changed form, over the gap. A change is a cause if it
closes at least half of the gap; `standard+scale=1/r` shows the temperature to be one if it *opens* at least half (it
closes at most half). Each must be beyond the 95% interval of the difference, pooled over all forms. The comparison
with the paper is of `mlr+paper` as it is and of `standard`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from paper.evidence import describe_resolution, estimates, format_estimate, is_lower, pooled_margin
from paper.language import LOSS, TEXT, language_trial, mlr_unscaled
from paper.study import Finding, Label, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.comparison.run import ModelSizes
from structattn.drawing.style import INK, QUIET, new_figure, styled
from structattn.training import Preset, TrainConfig, preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STANDARD, _PAPER = ("standard", "rotary", 1.0), ("mlr+paper", "rotary", 1.0)
_STANDARD_LEARNED, _PAPER_LEARNED = ("standard", "learned", 1.0), ("mlr+paper", "learned", 1.0)

Form = tuple[str, str, float]
"""Structure, positions, and the rate of the norms' gains over that of the rest."""

FORMS: dict[Form, str] = {
    _STANDARD: "standard attention",
    _PAPER: "the paper's form; rotary rates over the whole head",
    ("standard+scale=1/r", "rotary", 1.0): "standard attention at `1/r`: the temperature alone",
    ("mlr+paper+gains=none", "rotary", 1.0): "without gains",
    ("mlr+paper+level_weight=1/sqrt(r)", "rotary", 1.0): "level weights `1/sqrt(r)`, with gains",
    (mlr_unscaled(), "rotary", 1.0): "level weights `1/sqrt(r)`, without gains",
    ("mlr+paper", "rotary", 3.7): "3.7 times the learning rate for the norms",
    ("mlr+paper+frequencies=per_level", "rotary", 1.0): "rotary rates within each level",
    _PAPER_LEARNED: "learned positions",
    _STANDARD_LEARNED: "standard attention, learned positions",
}
"""Forms in words."""


class Reasons(Study):
    """Find what the paper's form lacks after a short training."""

    name = "reasons"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Models of 4 layers, width 64 and 2 heads on 256 characters of context, for 2e12 FLOPs (visible pairs), "
            "the smallest of the scaling study."
        ),
        "paper": "Models of 6 layers and width 256 on 1,024 characters of context, 20 tokens per parameter.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train every form at equal FLOPs."""
        if scale == "small":
            row = dataclasses.replace(preset("demo"), dim=64, heads=2, flops=2e12, learning_rate=3e-3)
        else:
            row = preset("paper-256")
        return with_seeds([_trial(form, data, row) for form in FORMS], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the loss of each form."""
        losses = _losses(outcomes)
        with styled():
            figure = new_figure(7.4, 3.4)
            axes = figure.add_subplot()
            for place, (form, each) in enumerate(reversed(losses.items())):
                colour = INK if form in (_STANDARD, _PAPER) else "C0"
                axes.errorbar(each.mean, place, xerr=each.standard_error or 0.0, fmt="o", color=colour, markersize=4.5)
            axes.set_yticks(range(len(losses)), [_name(form) for form in reversed(losses)], fontsize=7)
            for reference in (_STANDARD, _PAPER):
                if reference in losses:
                    axes.axvline(losses[reference].mean, color=QUIET, linewidth=0.8, linestyle=":")
            axes.set(xlabel=LOSS)
        return figure

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Return a Markdown table: the loss of each form, and the share of the gap that it closes."""
        losses = _losses(outcomes)
        lines = ["| form | what it is | loss | of the gap | seeds |", "|---|---|---|---|---|"]
        for form, each in losses.items():
            share = _share(losses, form) or ""
            lines.append(f"| `{_name(form)}` | {FORMS[form]} | {format_estimate(each)} | {share} | {each.count} |")
        return "\n".join(lines)

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Name the causes by the rule of this module."""
        losses = _losses(outcomes)
        if _STANDARD not in losses or _PAPER not in losses:
            return Finding("Too few trials ended to compare forms.")
        gap = losses[_PAPER].mean - losses[_STANDARD].mean
        words = [f"With rotary positions the paper's form is {gap:+.3f} nats from standard attention: the gap."]
        for form, each in losses.items():
            if share := _share(losses, form):
                words.append(f"{_name(form)}: {format_estimate(each)}, {share}.")
        if _STANDARD_LEARNED in losses and _PAPER_LEARNED in losses:
            learned = losses[_PAPER_LEARNED].mean - losses[_STANDARD_LEARNED].mean
            words.append(f"With learned positions the paper's form is {learned:+.3f} nats from standard attention.")
        words.append(describe_resolution(losses.values()))
        return Finding(" ".join(words), is_lower(losses[_PAPER], losses[_STANDARD], losses.values()))


def _trial(form: Form, data: str, row: Preset) -> Trial:
    structure, positions, norm_rate = form
    sizes = ModelSizes(row.layers, row.dim, row.heads, positions)
    train = TrainConfig(
        flops=row.flops, batch_size=row.batch_size, learning_rate=row.learning_rate, norm_rate=norm_rate
    )
    labels: dict[str, Label] = {"positions": positions, "norm_rate": norm_rate}
    return language_trial(structure, data, sizes, row.context_length, train, labels)


def _losses(outcomes: Sequence[Outcome]) -> dict[Form, Estimate]:
    """Return the mean final loss of each form."""
    table = estimates(outcomes, "structure", "positions", "norm_rate")
    return {(str(name), str(positions), float(rate)): each for (name, positions, rate), each in table.items()}


def _share(losses: Mapping[Form, Estimate], form: Form) -> str | None:
    """Say which share of the gap a form closes, or one of standard attention opens, with its 95% interval.

    None for the ends of the gap, for standard attention with other positions, and without a gap.
    """
    if form in (_STANDARD, _PAPER, _STANDARD_LEARNED) or _STANDARD not in losses or _PAPER not in losses:
        return None
    gap = losses[_PAPER].mean - losses[_STANDARD].mean
    opens = form[0].startswith("standard")
    end = losses[_STANDARD if opens else _PAPER]
    if not gap:
        return None
    share = (losses[form].mean - end.mean) / gap * (1 if opens else -1)
    margin = pooled_margin(losses.values(), losses[form], end) / abs(gap)
    spread = f" ± {margin:.0%}" if math.isfinite(margin) else ""
    return f"{share:.0%}{spread} {'opened' if opens else 'closed'}"


def _name(form: Form) -> str:
    """Return structure and settings of a form in short."""
    structure, positions, rate = form
    return (
        structure
        + (", learned positions" if positions == "learned" else "")
        + ("" if rate == 1.0 else f", norms x{rate:g}")
    )
