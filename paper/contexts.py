"""Compare levels over the length of the context, at a fixed width.

*Rule, written before the first run.* The gain is the loss of standard attention minus that of `mlr`, paired by seed:
both read the same tokens in the same order, as many in every context. Levels gain with the context if the slope of the
gain over doublings of the context is above zero beyond its 95% interval over seeds. They do not if it is below zero by
as much. A window of 64 and heads that are thin alike for all pairs, with as many cache numbers as `mlr`, stand beside
it and are not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from paper.drawing import set_log2_ticks
from paper.evidence import describe_resolution, estimates, label_values, paired_difference, ranked, with_label
from paper.language import TEXT, language_trial
from paper.study import Finding, Outcome, Scale, Study, Trial, with_seeds
from structattn.comparison.estimate import Estimate, above_zero
from structattn.comparison.run import ModelSizes
from structattn.drawing.style import QUIET, REFERENCE, new_figure, pens, styled
from structattn.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEVELS = "mlr"


class Contexts(Study):
    """Gain of levels over context length."""

    name = "contexts"
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Models of 4 layers, width 128 and 4 heads of 32 on 256 to 2,048 characters of context, 1,000 steps of "
            "4,096 characters: equal tokens."
        ),
        "paper": (
            "Models of 6 layers, width 256 and 4 heads of 64 on 256 to 4,096 characters of context, 20,000 steps of "
            "32,768 characters."
        ),
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train every structure at every context, for equal tokens."""
        small = scale == "small"
        contexts = (256, 512, 1024, 2048) if small else (256, 1024, 4096)
        sizes = ModelSizes(4, 128, 4, "rotary") if small else ModelSizes(6, 256, 4, "rotary")
        tokens, steps = (4_096, 1_000) if small else (32_768, 20_000)
        thin = sizes.dim // sizes.heads // 4  # the share of the cache that `mlr` keeps
        structures = (REFERENCE, _LEVELS, "swa:64", f"mlr:{thin}+value_ranks={thin}")
        trials = []
        for context in contexts:
            train = TrainConfig(steps=steps, batch_size=tokens // context, learning_rate=3e-3)
            trials += [language_trial(name, data, sizes, context, train, {"context": context}) for name in structures]
        return with_seeds(trials, seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the gain over standard attention against the context."""
        contexts = [int(each) for each in label_values(outcomes, "context")]
        names = [str(name) for name in label_values(outcomes, "structure") if name != REFERENCE]
        with styled():
            figure = new_figure(5.2, 3.4)
            axes = figure.add_subplot()
            axes.axhline(0, color=QUIET, linewidth=1)
            for name, pen in pens(names).items():
                points = [(at, gain) for at in contexts if (gain := _gain(outcomes, name, at)) is not None]
                axes.errorbar(
                    [at for at, _ in points],
                    [gain.mean for _, gain in points],
                    yerr=[gain.margin or 0.0 for _, gain in points],
                    fmt="o-",
                    color=pen.colour,
                    markersize=4,
                    capsize=3,
                    label=name,
                )
            set_log2_ticks(axes, contexts)
            axes.set(xlabel="context, characters", ylabel="nats below standard attention")
            axes.legend(frameon=False, fontsize=8)
        return figure

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """State the gain at each context, and its slope."""
        table = estimates(outcomes, "context", "structure")
        if not table:
            return Finding("No trial ended.")
        words = []
        for context in label_values(outcomes, "context"):
            losses = {str(name): each for (at, name), each in table.items() if at == context}
            if losses:
                words.append(f"Loss at context {context}: {ranked(losses)}.")
        words.append(describe_resolution(table.values()))
        slopes = _slopes(outcomes)
        if not slopes:
            return Finding(" ".join(words))
        slope = Estimate.of(slopes)
        spread = "" if slope.margin is None else f" ± {slope.margin:.3f}"
        words.append(f"The gain of {_LEVELS} over {REFERENCE} grows by {slope.mean:.3f}{spread} nats per doubling.")
        return Finding(" ".join(words), above_zero(slope))


def _gain(outcomes: Sequence[Outcome], structure: str, context: int) -> Estimate | None:
    """Return standard attention's loss minus the structure's, paired by seed."""
    here = with_label(outcomes, context=context)
    return paired_difference(with_label(here, structure=REFERENCE), with_label(here, structure=structure))


def _slopes(outcomes: Sequence[Outcome]) -> list[float]:
    """Return, for each seed, the slope of the gain over doublings of the context."""
    slopes = []
    for seed in label_values(outcomes, "seed"):
        ours = with_label(outcomes, seed=seed)
        gains = {int(at): _gain(ours, _LEVELS, int(at)) for at in label_values(ours, "context")}
        points = [(math.log2(context), gain.mean) for context, gain in gains.items() if gain is not None]
        if len(points) > 1:
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return slopes
