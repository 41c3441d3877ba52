"""Best learning rate over widths, with and without muP (figure 5)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paper.drawing import draw_estimates
from paper.evidence import all_true, describe_resolution, estimates, is_lower, with_label
from paper.language import LOSS, TEXT, language_trial
from paper.study import Finding, Label, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.comparison.run import ModelSizes
from structattn.drawing.style import new_figure, styled
from structattn.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {"on": "with", "off": "without"}
"""Values of the label `mup`, each with its word in titles and sentences."""


class Mup(Study):
    """Figure 5: loss against learning rate over widths."""

    name = "mup"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Models of 3 layers on 128 characters of context, 250 steps of 8 rows. Such short trainings have high best "
            "rates."
        ),
        "paper": "Models of 6 layers on 1,024 characters of context, 5,000 steps of 32 rows.",
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Vary learning rate and width, with and without muP."""
        if scale == "small":
            widths, head_dim, layers, length, batch, steps = (64, 128, 256), 32, 3, 128, 8, 250
            rates = [2.0**power for power in (-9.5, -8, -6.5, -5, -3.5)]
        else:
            widths, head_dim, layers, length, batch, steps = (256, 512, 1024), 64, 6, 1024, 32, 5_000
            rates = [2.0**power for power in range(-13, -4)]
        trials = []
        for dim, mup, rate in itertools.product(widths, (True, False), rates):
            train = TrainConfig(steps=steps, batch_size=batch, learning_rate=rate, mup=mup, base_dim=widths[0])
            sizes = ModelSizes(layers, dim, dim // head_dim, "rotary")
            labels: dict[str, Label] = {"mup": "on" if mup else "off", "learning_rate": rate}
            trials.append(language_trial("standard", data, sizes, length, train, labels))
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot loss against learning rate, one line per width.

        Left with muP, right without.
        """
        with styled():
            figure = new_figure(7.6, 3.4)
            first = None
            for index, (mup, word) in enumerate(_PANELS.items()):
                axes = first = figure.add_subplot(1, 2, index + 1, sharey=first)
                table = estimates(with_label(outcomes, mup=mup), "width", "learning_rate")
                lines: dict[str, list[tuple[float, Estimate]]] = {}
                for (width, rate), each in sorted(table.items()):
                    if math.isfinite(each.mean):
                        lines.setdefault(f"D = {width}", []).append((float(rate), each))
                draw_estimates(axes, lines)
                axes.set(xlabel="learning rate", title=f"{word} muP")
                axes.set_xscale("log", base=2)
                if index == 0:
                    axes.set_ylabel(LOSS)
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """State what the narrowest model's best rate costs the widest model."""
        ended = [outcome for outcome in outcomes if outcome.rows and math.isfinite(outcome.loss)]
        groups = list(estimates(ended, "mup", "width", "learning_rate").values())
        parts, is_worse = [], []
        for mup, word in _PANELS.items():
            transfer = _transfer(with_label(ended, mup=mup))
            if transfer is None:
                return Finding("Too few trials ended to compare widths.")
            parts.append(f"{word.capitalize()} muP {transfer.describe()}")
            is_worse.append(True if transfer.moved is None else is_lower(transfer.best, transfer.moved, groups))
        with_mup, without = is_worse
        return Finding(f"{' '.join(parts)} {describe_resolution(groups)}", all_true([with_mup is None, without]))


@dataclass(frozen=True)
class _Transfer:
    """Loss of the widest model at the narrowest model's best rate."""

    best_rates: dict[int, float]
    """Learning rate with the lowest mean loss, by width in ascending order."""

    best: Estimate
    """Loss of the widest model at its own best rate."""

    moved: Estimate | None
    """Its loss at the narrowest model's best rate; None if it does not train there."""

    def describe(self) -> str:
        """Say which rates are best and what the transfer costs."""
        rates = ", ".join(f"2^{math.log2(rate):g} at D = {width}" for width, rate in self.best_rates.items())
        wide = f"the model of D = {max(self.best_rates)}"
        cost = (
            f"{wide} does not train"
            if self.moved is None
            else f"the loss of {wide} is {self.moved.mean - self.best.mean:.3f} nats above its own best"
        )
        return f"the best rates are {rates}. At the best rate of D = {min(self.best_rates)}, {cost}."


def _transfer(outcomes: Sequence[Outcome]) -> _Transfer | None:
    """Compare best rates over widths; None if fewer than two widths ended."""
    table = {
        (int(width), float(rate)): each for (width, rate), each in estimates(outcomes, "width", "learning_rate").items()
    }
    best: dict[int, float] = {}
    for width, rate in sorted(table, key=lambda key: table[key].mean):
        best.setdefault(width, rate)
    if len(best) < 2:
        return None
    narrow, wide = min(best), max(best)
    return _Transfer(dict(sorted(best.items())), table[wide, best[wide]], table.get((wide, best[narrow])))
