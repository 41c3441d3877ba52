"""Language: loss against compute over widths, learning rates under muP, ranks over levels (figures 4 and 5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paper.drawing import draw_lines, estimate_lines
from paper.laws import PowerLaw
from paper.study import (
    Finding,
    Label,
    Outcome,
    Scale,
    Study,
    Trial,
    all_of,
    below,
    estimates,
    resolution,
    sentence,
    show,
    with_seeds,
)
from structattn.ops.hierarchy import parse_ranks
from structattn.studies.estimate import Estimate
from structattn.studies.run import ModelSizes, RunConfig
from structattn.studies.style import new_figure, pens, styled
from structattn.tasks import LanguageConfig
from structattn.training import TrainConfig, preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNSCALED = "mlr+level_weight=1/sqrt(r)+gains=none"
"""MLR attention in the scale of standard attention, beside the paper's `1/r_l` and `1/m`."""

TEXT = "stdlib"
"""What language studies read by themselves: there wherever Python is."""

_PAPERS_SPLITS = ("32|8|6|4|4|4|4|2", "16|8|4|4")
"""Half of the rank global, the rest falling: the paper's, and such a one for half the rank."""

_LOSS = "validation loss, nats per character"


def trial(
    structure: str, data: str, sizes: ModelSizes, context_length: int, train: TrainConfig, labels: dict[str, Label]
) -> Trial:
    """One language model."""
    task = LanguageConfig(data, context_length, evaluation_tokens=max(context_length, 65_536))
    return Trial(RunConfig(structure, task, sizes, train), {"structure": structure, "width": sizes.dim, **labels})


class Scaling(Study):
    """Figure 4."""

    name = "scaling"
    title = "Loss against training compute over widths"
    question = "At equal compute, over a range of widths, which attention structure predicts text best?"
    reported = (
        "MLR attention has the lowest validation loss at equal compute at every width, below standard attention, "
        "a sliding window, and a global plus a sliding-window part."
    )
    figure = "figure 4"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": "Models of 4 layers and widths 64 to 128 on 256 characters of context, for 2e12 to 1e13 FLOPs.",
        "paper": "Models of 6 layers and widths 256 to 768 on 1,024 characters of context, 20 tokens a parameter.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Every structure at every width, budgets growing with the parameters."""
        if scale == "paper":
            names = ("standard", "mlr", UNSCALED, "swa:128", "gswa:128|32")
            rows = [preset(f"paper-{dim}") for dim in (256, 384, 512, 768)]
        else:
            names = ("standard", "mlr", UNSCALED, "swa:64", "gswa:64|16")
            demo = dataclasses.replace(preset("demo"), learning_rate=3e-3, evaluation_tokens=65_536)
            budgets = {64: 2e12, 96: 5e12, 128: 1e13}
            rows = [dataclasses.replace(demo, dim=d, heads=d // 32, flops=f) for d, f in budgets.items()]
        trials = []
        for row in rows:
            sizes = ModelSizes(row.layers, row.dim, row.heads, "rotary")
            train = TrainConfig(flops=row.flops, batch_size=row.batch_size, learning_rate=row.learning_rate)
            labels: dict[str, Label] = {"budget": row.flops}
            trials += [trial(name, data, sizes, row.context_length, train, labels) for name in names]
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Final losses against compute, each structure with its law and band."""
        with styled():
            figure = new_figure(7.4, 3.6)
            axes = figure.add_subplot()
            names = _structures(outcomes)
            lines = {name: _points(outcomes, name) for name in names}
            draw_lines(axes, lines)
            for name, pen in pens(names).items():
                law = _law(outcomes, name)
                if law is not None:
                    span = np.geomspace(lines[name][0][0], lines[name][-1][0], 40)
                    axes.fill_between(span, *law.band(span), color=pen.colour, alpha=0.12, linewidth=0)
            axes.set(xlabel="training FLOPs", ylabel=_LOSS)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                each("{x:.1f}")
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """The structures from best to worst at each budget, and the exponents."""
        table = estimates(outcomes, "budget", "structure")
        budgets = sorted({budget for budget, _ in table}, key=float)
        said, mlr_best = [], list[bool | None]()
        for budget in budgets:
            row = {str(name): each for (there, name), each in table.items() if there == budget}
            ranking = sorted(row, key=lambda name: row[name].mean)
            said.append(f"at {float(budget):.2g} FLOPs {', '.join(f'{name} {show(row[name])}' for name in ranking)}")
            others = [each for name, each in row.items() if name not in ("mlr", UNSCALED)]
            mlr_best += [below(row.values(), row["mlr"], each) for each in others] if "mlr" in row else [None]
        if not said:
            return Finding("No trial ended.")
        exponents = [
            f"{name} {law.exponent:.3f} ({law.interval[0]:.3f} to {law.interval[1]:.3f})"
            for name in _structures(outcomes)
            if (law := _law(outcomes, name)) is not None
        ]
        statement = f"{sentence('; '.join(said))} {resolution(table.values())}"
        if exponents:
            statement += f" Exponents of loss ~ compute^-a, with 95% bands: {', '.join(exponents)}."
        return Finding(statement, all_of(mlr_best))


class Mup(Study):
    """Figure 5."""

    name = "mup"
    title = "The best learning rate over widths, with and without muP"
    question = "Does the best learning rate stay put as the width grows, so that it can be found on a small model?"
    reported = "With muP the best learning rate is the same at every width; without it, it falls as the width grows."
    figure = "figure 5"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": "Models of 3 layers on 128 characters of context, 250 steps of 8 rows, whose best rates are high.",
        "paper": "Models of 6 layers on 1,024 characters of context, 5,000 steps of 32 rows.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Learning rates in even steps of their logarithm, over widths, with and without muP."""
        widths = {"small": (64, 128, 256), "paper": (256, 512, 1024)}[scale]
        rates = [2.0**power for power in ((-9.5, -8, -6.5, -5, -3.5) if scale == "small" else range(-13, -4))]
        length, batch, steps = (128, 8, 250) if scale == "small" else (1024, 32, 5_000)
        layers, head = (3, 32) if scale == "small" else (6, 64)
        trials = []
        for dim in widths:
            for mup in (True, False):
                for rate in rates:
                    train = TrainConfig(steps=steps, batch_size=batch, learning_rate=rate, mup=mup, base_dim=widths[0])
                    sizes = ModelSizes(layers, dim, dim // head, "rotary")
                    labels: dict[str, Label] = {"mup": "on" if mup else "off", "learning_rate": rate}
                    trials.append(trial("standard", data, sizes, length, train, labels))
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Loss against learning rate, a line for each width, muP beside none."""
        with styled():
            figure = new_figure(7.6, 3.4)
            first = None
            for place, mup in enumerate(("on", "off")):
                axes = first = figure.add_subplot(1, 2, place + 1, sharey=first)
                table = estimates([each for each in outcomes if each.labels["mup"] == mup], "width", "learning_rate")
                lines: dict[str, list[tuple[float, Estimate]]] = {}
                for (width, rate), each in sorted(table.items()):
                    if math.isfinite(each.mean):
                        lines.setdefault(f"D = {width}", []).append((float(rate), each))
                draw_lines(axes, lines)
                axes.set(xlabel="learning rate", title="with muP" if mup == "on" else "without muP")
                axes.set_xscale("log", base=2)
                if place == 0:
                    axes.set_ylabel(_LOSS)
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """What the rate that is best for the narrowest model costs the widest, with muP and without."""
        ended = [outcome for outcome in outcomes if outcome.rows and math.isfinite(outcome.loss)]
        groups = list(estimates(ended, "mup", "width", "learning_rate").values())
        said, costs = [], []
        for mup, words in (("on", "with"), ("off", "without")):
            table = estimates([each for each in ended if each.labels["mup"] == mup], "width", "learning_rate")
            best = _best_rates(table)
            if len(best) < 2:
                return Finding("Too few trials ended to compare widths.")
            narrow, wide = min(best), max(best)
            lowest, carried = table[wide, best[wide]], table.get((wide, best[narrow]))
            rates = ", ".join(f"{_power(rate)} at D = {width}" for width, rate in best.items())
            lost = "all, as it does not train," if carried is None else f"{carried.mean - lowest.mean:.3f} nats"
            said.append(
                f"{words} muP the lowest mean loss is at {rates}, and the rate that is best at D = {narrow} costs the "
                f"model of D = {wide} {lost} against its own best"
            )
            costs.append(True if carried is None else below(groups, lowest, carried))
        on, off = costs
        return Finding(f"{sentence('; '.join(said))} {resolution(groups)}", all_of([on is None, off]))


class Ranks(Study):
    """The paper's choice of ranks, questioned."""

    name = "ranks"
    title = "How should the ranks be split over the levels?"
    question = "At equal compute, how much of a head's rank should far pairs see, in MLR attention on text?"
    reported = (
        "At equal compute levels are better than none; its ranks for language are 32|8|6|4|4|4|4|2 of 64, half of the "
        "rank global and the rest falling."
    )
    figure = "section 5"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": "Models of 4 layers, width 128 and heads of 32 on 256 characters of context, for 5e12 FLOPs.",
        "paper": "Models of 6 layers, width 512 and heads of 64 on 1,024 characters of context, 20 tokens a parameter.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Splits from one level to a single global pair of dimensions, in the scale of standard attention."""
        if scale == "paper":
            row = preset("paper-512")
            splits: tuple[str, ...] = ("64", "32|32", "32|16|16", "32|8|6|4|4|4|4|2", "8x8", "2|2|4|4|4|8|8|32")
        else:
            row = dataclasses.replace(preset("demo"), flops=5e12, learning_rate=3e-3)
            splits = ("32", "16|16", "16|8|4|4", "8x4", "4|4|8|16", "2|2|4|24")
        sizes = ModelSizes(row.layers, row.dim, row.heads, "rotary")
        train = TrainConfig(flops=row.flops, batch_size=row.batch_size, learning_rate=row.learning_rate)
        trials = [
            trial(
                f"mlr:{split}+level_weight=1/sqrt(r)+gains=none",
                data,
                sizes,
                row.context_length,
                train,
                {"ranks": split},
            )
            for split in splits
        ]
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Loss against the share of key numbers that a split keeps."""
        points = sorted((_key_share(str(key[0])), each) for key, each in estimates(outcomes, "ranks").items())
        return estimate_lines(
            {"MLR attention": points}, xlabel="share of key numbers kept when generating", ylabel=_LOSS
        )

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """The best split, one level and the most extreme."""
        table = {str(key[0]): each for key, each in estimates(outcomes, "ranks").items()}
        if not table:
            return Finding("No trial ended.")
        ordered = sorted(table, key=lambda split: table[split].mean)
        said = ", ".join(f"{split} {show(table[split])}" for split in ordered)
        flat = next((each for split, each in table.items() if len(parse_ranks(split)) == 1), None)
        papers = next((table[split] for split in _PAPERS_SPLITS if split in table), None)
        agrees = None if flat is None or papers is None else below(table.values(), papers, flat)
        return Finding(f"From best to worst: {said}. {resolution(table.values())}", agrees)


def _structures(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(str(outcome.labels["structure"]) for outcome in outcomes))


def _points(outcomes: Sequence[Outcome], structure: str) -> list[tuple[float, Estimate]]:
    chosen = [each for each in outcomes if each.labels["structure"] == structure]
    return sorted((float(key[0]), each) for key, each in estimates(chosen, "budget").items())


def _law(outcomes: Sequence[Outcome], structure: str) -> PowerLaw | None:
    chosen = [each for each in outcomes if each.labels["structure"] == structure and each.rows]
    if len({each.labels["budget"] for each in chosen}) < 2:
        return None
    return PowerLaw.fit([float(each.labels["budget"]) for each in chosen], [each.loss for each in chosen])


def _best_rates(table: Mapping[tuple[Label, ...], Estimate]) -> dict[int, float]:
    """For each width the learning rate with the lowest mean loss."""
    best: dict[int, float] = {}
    for width, rate in sorted(table, key=lambda key: table[key].mean):
        best.setdefault(int(width), float(rate))
    return dict(sorted(best.items()))


def _power(rate: float) -> str:
    return f"2^{math.log2(rate):g}"


def _key_share(split: str) -> float:
    """`Σ r_l / 2^{l-1}` over `Σ r_l`: what dyadic blocks keep when full."""
    ranks: Any = parse_ranks(split)
    return sum(rank / 2**level for level, rank in enumerate(ranks)) / sum(ranks)
