"""Search for the default form of MLR attention.

*Rule, written before the first run.*

1. Screening: one seed. Every choice changes one thing of `BASE`. On each axis the choice with the lowest loss goes on;
   where none is below `BASE`, the axis keeps what `BASE` has.
2. Combination: forms made of the choices that went on, two seeds. Screening and combination have at most 40 runs.
3. Confirmation: the two forms with the lowest mean loss that keep at most half of the cache numbers of standard
   attention; `standard`; `swa:64`; and the better of the other plain alternatives (thin heads, few key-value heads).
   Each is trained with the setting of the novels (4.5e13 FLOPs) and with a quarter of its budget.
4. The default is the form with the lowest mean loss after the longer training. If the other form is within the 95%
   interval of the difference, it is the one of the two with fewer cache numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from paper.evidence import (
    describe_resolution,
    estimates,
    format_estimate,
    is_lower,
    paired_difference,
    ranked,
    with_label,
)
from paper.language import LOSS, TEXT
from paper.learned_depths import Learned, LearnedDepthRun
from paper.study import Finding, Label, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.comparison.run import ModelSizes, RunConfig, of_seed
from structattn.drawing.style import INK, QUIET, REFERENCE, new_figure, styled
from structattn.layers import build_attention
from structattn.tasks import LanguageConfig
from structattn.training import TrainConfig, preset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WEIGHT = "+level_weight=1/sqrt(r)"
_RATES = "+frequencies=whole"
_PLAIN = _WEIGHT + _RATES
"""Scale and rotary rates of standard attention."""
_PER_LEVEL = "+level_weight=1/sqrt(r)+frequencies=per_level"
_SHARP = "+level_weight=1/sqrt(r_l)+frequencies=per_level"

BASE = f"mlr:8|24+windows=64{_PLAIN}"
"""Two levels: a quarter of the head everywhere, the rest over 64 tokens."""

THIN = f"mlr:12+value_ranks=12{_PLAIN}"
"""Give queries, keys and values 12 dimensions a head in place of 32."""

AXES: dict[str, tuple[str, ...]] = {
    "plain": ("standard", "swa:64", THIN, "standard+kv_heads=2"),
    "windows": (
        BASE,
        f"mlr:8|24+windows=32{_PLAIN}",
        f"mlr:8|24+windows=128{_PLAIN}",
        f"mlr:4|28+windows=64{_PLAIN}",
        f"mlr:8|8|16+windows=128|32{_PLAIN}",
        f"mlr:8|8|16+windows=256|64{_PLAIN}",
        f"mlr:8x4+windows=128|32|8{_PLAIN}",
        f"mlr:8x4+windows=256|128|64{_PLAIN}",
        f"mlr:4|4|8|16+windows=256|128|64{_PLAIN}",
        f"mlr:4x8+windows=256|128|64|32|16|8|4{_PLAIN}",
    ),
    "blocks": (f"mlr:8|24+block_sizes=*|128{_PLAIN}", "mlr:16|4|4|2|2|2|2+paper"),
    "values": (f"mlr:8|24+windows=64+value_ranks=32|0{_PLAIN}",),
    "rotary": tuple(
        f"mlr:8|24+windows=64{_WEIGHT}+frequencies={name}" for name in ("per_level", "slow_far", "near_only")
    ),
    "weights": (f"mlr:8|24+windows=64+level_weight=1/sqrt(r_l){_RATES}",),
}
"""Structures of the screening, by axis."""

LEARNED: tuple[Learned, ...] = ("gain", "bias")

QUARTERS = f"mlr:8x4+windows=128|32|8{_SHARP}"
HALVES = f"mlr:4x8+windows=256|128|64|32|16|8|4{_SHARP}"
"""The two confirmed forms: windows fall to a quarter, or to half, from level to level."""

COMBINED = (
    f"mlr:8x4+windows=128|32|8{_PER_LEVEL}",
    f"mlr:8|24+windows=64{_PER_LEVEL}",
    f"mlr:4x8+windows=256|128|64|32|16|8|4{_PER_LEVEL}",
    f"mlr:4|28+windows=64{_PER_LEVEL}",
    f"mlr:4|4|8|16+windows=128|32|8{_PER_LEVEL}",
    QUARTERS,
    HALVES,
)
"""Forms of the combination."""

CONFIRMED = (QUARTERS, HALVES, "standard+kv_heads=2", "standard", "swa:64")
BUDGETS = (1.125e13, 4.5e13)
"""Training FLOPs of the confirmation."""

PILOTS = (
    (f"mlr:4|28+windows=64{_PER_LEVEL}", 0),
    (f"mlr:4|28+windows=64{_PER_LEVEL}", 1),
    (f"mlr:4|4|8|16+windows=256|128|64{_SHARP}", 0),
    (f"mlr:4x8+windows=256|160|100|64|40|24|16{_SHARP}", 0),
)
"""Forms that reach further with many dimensions, and their seeds."""

_CONTEXT = 512
_SHORT = "600 steps"
_SMALL = ModelSizes(4, 128, 4, "rotary")
_NOVELS = ModelSizes(4, 192, 6, "rotary")


class Levels(Study):
    """Search for the default form of MLR attention: screening, combination, confirmation."""

    name = "levels"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Contexts of 512 characters. Screening and combination: 4 layers, width 128, 4 heads of 32, 600 steps of 4 "
            "windows (1.2M characters). Confirmation: 4 layers, width 192, 6 heads of 32, batch 8, equal FLOPs."
        ),
        "paper": "Confirmation alone: models of 6 layers, width 512 and heads of 64 on 1,024 characters of context.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Return all runs; `seeds` are those of the confirmation."""
        if scale == "paper":
            return with_seeds(_paper_confirmation(data), seeds)
        confirmation = [_confirmed(structure, data, flops) for structure in CONFIRMED for flops in BUDGETS]
        pilots = [_pilot(structure, data, seed) for structure, seed in PILOTS]
        known = [*screening(data), *combination(data, min(2, seeds))]
        return [*known, *with_seeds(confirmation, seeds), *(each for each in pilots if each.config.seed < seeds)]

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the loss against the share of cache numbers, for both settings."""
        confirmed = with_label(outcomes, stage="confirmation")
        with styled():
            figure = new_figure(7.4, 3.6)
            panels: list[tuple[Label, str]] = [(_SHORT, "screening and combination")]
            panels += [(budget, "confirmation, the longer training") for budget in _budgets(confirmed)[-1:]]
            panels = [(budget, title) for budget, title in panels if _losses_at(outcomes, budget)] or panels
            for axes, (budget, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                _draw_losses(axes, _losses_at(outcomes if budget == _SHORT else confirmed, budget), _setting(budget))
                axes.set(title=title)
            figure.axes[0].set_ylabel(LOSS)
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Rank the confirmed structures and name the default by the rule.

        Compare it with the paper's form.
        """
        words = []
        confirmed = with_label(outcomes, stage="confirmation")
        for budget in _budgets(confirmed):
            losses = _losses_at(confirmed, budget)
            words.append(f"Loss at {budget:.4g} FLOPs: {ranked(losses)}. {describe_resolution(losses.values())}")
            forms = [name for name in losses if name in (QUARTERS, HALVES)]
            if budget == _budgets(confirmed)[-1] and len(forms) == 2:
                words.append(f"By the rule the default is the form `{_chosen(losses, forms)}`.")
        compared = _losses_at(outcomes, _SHORT) or (_losses_at(confirmed, _budgets(confirmed)[-1]) if words else {})
        papers = {name: each for name, each in _losses_at(outcomes, _SHORT).items() if name.endswith("+paper")}
        if papers:
            words.append(f"The paper's form, trained as in the screening: {ranked(papers)}.")
        return Finding(" ".join(words) or "No run of the confirmation ended.", _paper_is_lowest(compared))

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Return a Markdown table: every structure with its cost and loss."""
        lines = [
            "| stage | structure | score FLOPs | cache numbers | loss | seeds |",
            "|---|---|---|---|---|---|",
        ]
        for (stage, structure, budget), loss in estimates(outcomes, "stage", "structure", "budget").items():
            scores, cache = _shares(str(structure), _setting(budget))
            where = stage if stage == "screening" else f"{stage}, {float(budget):.4g} FLOPs"
            name = str(structure).replace("|", ",")
            lines.append(
                f"| {where} | `{name}` | {scores:.0%} | {cache:.0%} | {format_estimate(loss)} | {loss.count} |"
            )
        return "\n".join([*lines, *_paired_lines(outcomes)])


def _paired_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table of the default minus each other confirmed structure, paired by seed."""
    lines = []
    confirmed = with_label(outcomes, stage="confirmation")
    for budget in _budgets(confirmed):
        runs = with_label(confirmed, budget=budget)
        for other in CONFIRMED:
            gap = paired_difference(with_label(runs, structure=HALVES), with_label(runs, structure=other))
            if other != HALVES and gap is not None and gap.margin is not None:
                name = other.replace("|", ",")
                lines.append(f"| {float(budget):.4g} | `{name}` | {gap.mean:+.3f} ± {gap.margin:.3f} |")
    if not lines:
        return []
    heading = ["", "`mlr` minus each other structure, paired by seed, with half of the 95% interval:", ""]
    return [*heading, "| FLOPs | structure | nats per character |", "|---|---|---|", *lines]


def screening(data: str) -> list[Trial]:
    """Return the runs of the screening."""
    trials = [_short(structure, data, 0) for structures in AXES.values() for structure in structures]
    return trials + [_short(BASE, data, 0, learned) for learned in LEARNED]


def combination(data: str, seeds: int = 2) -> list[Trial]:
    """Return the runs of the combination, without those of the screening."""
    known = {(each.config.attention, each.config.seed) for each in screening(data)}
    runs = [(structure, seed) for structure in (*COMBINED, "standard", "swa:64") for seed in range(seeds)]
    trials = [_short(structure, data, seed) for structure, seed in runs if (structure, seed) not in known]
    return [*trials, _short(QUARTERS, data, 0, "gain")]


def _short(structure: str, data: str, seed: int, learned: Learned | None = None) -> Trial:
    """Return a run of the screening or the combination."""
    task = LanguageConfig(data, _CONTEXT)
    train = TrainConfig(steps=600, batch_size=4, learning_rate=3e-3, seed=seed)
    labels = {"stage": "screening", "structure": structure, "budget": _SHORT}
    if learned is None:
        return Trial(RunConfig(structure, task, _SMALL, train, seed), labels)
    config = LearnedDepthRun(structure, task, _SMALL, train, seed, learned)
    return Trial(config, labels | {"structure": f"{structure}, learned {learned}"})


def _confirmed(structure: str, data: str, flops: float) -> Trial:
    """Return a run of the confirmation."""
    train = TrainConfig(flops=flops, batch_size=8, learning_rate=3e-3)
    config = RunConfig(structure, LanguageConfig(data, _CONTEXT), _NOVELS, train)
    return Trial(config, {"structure": structure, "stage": "confirmation", "budget": flops})


def _pilot(structure: str, data: str, seed: int) -> Trial:
    """Return a run like those of the confirmation."""
    trial = _confirmed(structure, data, BUDGETS[-1])
    return Trial(of_seed(trial.config, seed), {**trial.labels, "stage": "pilot"})


def _paper_confirmation(data: str) -> list[Trial]:
    """Return runs of one of the paper's models.

    The default form follows its heads and context.
    """
    row = preset("paper-512")
    sizes = ModelSizes(row.layers, row.dim, row.heads, "rotary")
    task = LanguageConfig(data, row.context_length)
    train = TrainConfig(flops=row.flops, batch_size=row.batch_size, learning_rate=row.learning_rate)
    return [
        Trial(
            RunConfig(structure, task, sizes, dataclasses.replace(train, flops=flops)),
            {"structure": structure, "stage": "confirmation", "budget": flops},
        )
        for structure in ("standard", "swa:128", "mlr", "mlr+paper")
        for flops in (row.flops / 4, row.flops)
    ]


def _budgets(confirmed: Sequence[Outcome]) -> list[float]:
    """Return the FLOPs of the runs that ended, ascending."""
    return sorted({float(each.labels["budget"]) for each in confirmed if each.rows})


def _losses_at(outcomes: Sequence[Outcome], budget: Label) -> dict[str, Estimate]:
    table = estimates(with_label(outcomes, budget=budget), "structure")
    return {str(name): each for (name,), each in table.items()}


def _paper_is_lowest(losses: Mapping[str, Estimate]) -> bool | None:
    """Compare the paper's form with the lowest of the others.

    Return None if one is missing or they are too close.
    """
    papers = [each for name, each in losses.items() if name.endswith("+paper")]
    others = [each for name, each in losses.items() if not name.endswith("+paper")]
    if not papers or not others:
        return None
    return is_lower(papers[0], min(others, key=lambda each: each.mean), losses.values())


def _chosen(losses: Mapping[str, Estimate], forms: Sequence[str]) -> str:
    """Return the default by step 4 of the rule."""
    lower, other = sorted(forms, key=lambda form: losses[form].mean)
    if is_lower(losses[lower], losses[other], losses.values()):
        return lower
    return min(lower, other, key=lambda form: _shares(form, _setting(BUDGETS[-1]))[1])


def _setting(budget: Label) -> tuple[int, int, int]:
    """Return width, heads and context of the models of a budget."""
    if budget == _SHORT:
        return _SMALL.dim, _SMALL.heads, _CONTEXT
    if budget in BUDGETS:
        return _NOVELS.dim, _NOVELS.heads, _CONTEXT
    row = preset("paper-512")
    return row.dim, row.heads, row.context_length


def _shares(structure: str, setting: tuple[int, int, int]) -> tuple[float, float]:
    """Return score FLOPs and cache numbers as shares of standard attention's.

    Both are at the context length.
    """
    context = setting[2]
    layers = [build_attention(each.partition(",")[0], *setting) for each in (structure, REFERENCE)]
    scores = [layer.mixing_flops(context).scores for layer in layers]
    cache = [layer.cache_numbers(context) for layer in layers]
    return scores[0] / scores[1], cache[0] / cache[1]


def _draw_losses(axes: Axes, losses: Mapping[str, Estimate], setting: tuple[int, int, int]) -> None:
    """Draw each structure's loss over its share of cache numbers.

    The plain ones and the confirmed have names.
    """
    for name, each in losses.items():
        cache = _shares(name, setting)[1]
        colour, mark, label = _style(name)
        axes.errorbar(cache, each.mean, yerr=each.standard_error or 0.0, fmt=mark, color=colour, markersize=4.5)
        offset, side = ((-7, -2), "right") if cache > 0.7 else ((7, -2), "left")
        axes.annotate(
            label, (cache, each.mean), textcoords="offset points", xytext=offset, ha=side, fontsize=7, color=QUIET
        )
    axes.set(xlabel=f"share of cache numbers at {setting[2]} characters")


def _style(structure: str) -> tuple[str, str, str]:
    """Return colour, mark and label of a structure."""
    if not structure.startswith("mlr"):
        return INK, "s", structure
    if structure in (QUARTERS, HALVES):
        return "C1", "o", "quarters" if structure == QUARTERS else "halves"
    named = {THIN: "thin heads", "mlr": "mlr"}
    return "C0", "o", "mlr+paper" if structure.endswith("+paper") else named.get(structure, "")
