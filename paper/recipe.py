"""The authors' language recipe, and the claim of figure 4 trained by it.

The recipe, with the file of their code (github.com/YilunKuang/structured-attention) that has it:

- Token and position tables of deviation 0.02, matrices of `1/sqrt(fan_in)`, residual outputs and head zero; muP with
  rates `rate · 768 / fan_in`, norms and tables at the rate itself; AdamW's epsilon 1e-20: `src/muP.py`.
- 2,000 warm-up steps, then a constant rate; betas (0.9, 0.95), gradients clipped at norm 1, no dropout, no biases:
  `train.py`. No weight decay, `decay_lr=False`, 6 layers, 100,000 steps: `config/struct_configs/train_struct_gpt2.py`.
- 32,768 tokens a step (4 rows of 1,024, 8 micro-batches), and the rates that were tried:
  `scripts/language_modeling/submit_language_modeling_greene.sh` and the config. The rates that figure 4 shows:
  `plots/plot_MLR_Long_Context.ipynb`, runs without the tag `bad_lr`.
- Scores: `8/r` for standard attention and windows; level weights `1/r_l` and gains `1/m` for MLR: `src/model.py`.

*Rule of the verdict, written before the first run.*

1. The loss of a run at some compute is the mean of the last five evaluations up to there, interpolated between
   evaluations: at a constant rate single ones scatter. Compute is counted as the authors do (`paper.axes`), and the
   structures are compared at the least compute at which one of them ends.
2. A structure's loss is the lowest of its mean losses over the rates that were run.
3. The claim holds if `mlr+paper` is below standard attention and below every window, each by more than the 95% interval
   pooled over seeds. It does not if it is above one of them by more than that. Else these runs cannot tell.
4. One seed of each kind has no spread, so it cannot tell, either. A difference is then held against 0.021 nats, the
   interval between single runs in the confirmation of `paper.levels` (3 seeds of 45 TFLOPs).
5. The default `mlr`, equal tokens and the count of visible pairs are shown and not judged. Nor are runs that have not
   ended: at a constant rate their losses compare with those of others after as many tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paper.axes import AUTHORS, VISIBLE_PAIRS, authors_flops, visible_pair_flops
from paper.evidence import all_true, describe_resolution, format_estimate, is_lower, label_values, ranked, with_label
from paper.language import LOSS, TEXT
from paper.study import UNFINISHED, Finding, Outcome, Scale, Study, Trial, metric, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.comparison.run import ModelSizes, RunConfig
from structattn.drawing.style import new_figure, pens, styled, two_lines
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.tasks import LanguageConfig
from structattn.tasks.presets import AUTHORS_TRAINING
from structattn.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_RATES = {
    "standard": {256: 3e-3, 384: 3e-3, 512: 1.65e-3, 768: 1.65e-3},
    "mlr": {256: 3e-3, 384: 1.65e-2, 512: 3e-3, 768: 1.65e-2},
    "swa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 3e-3},
    "gswa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 1.65e-2},
}
"""Learning rates of figure 4, by kind of attention and width."""

WARMUP_STEPS = 2_000


def recipe_sizes(layers: int, dim: int, heads: int) -> ModelSizes:
    """Return sizes with the authors' positions and initial deviations."""
    own = {name: AUTHORS_TRAINING[name] for name in ("positions", "token_deviation", "position_deviation")}
    return ModelSizes(layers, dim, heads, **own)


def recipe_training(steps: int, batch_size: int, learning_rate: float) -> TrainConfig:
    """Return the authors' training for a number of steps.

    Raises:
        ValueError: the steps do not go beyond the warm-up.
    """
    if steps <= WARMUP_STEPS:
        raise ValueError(f"steps must be above the {WARMUP_STEPS} of the warm-up, got {steps}")
    own = {name: AUTHORS_TRAINING[name] for name in ("schedule", "weight_decay", "base_dim", "epsilon")}
    warmup = WARMUP_STEPS / steps
    return TrainConfig(steps=steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup, **own)


_MLR = "mlr+paper"
_DEFAULT = "mlr"
_AVERAGED = 5
"""Evaluations that the loss of a run is the mean of."""

_SINGLE_RUNS = 0.021
"""Difference in nats below which two single runs tell nothing, see the rule."""

_SMALL_RATES = {
    3e-3: ("standard+scale=8/r", _MLR, "swa:32+scale=8/r", _DEFAULT),
    1.65e-2: (_MLR, "standard+scale=8/r", "swa:32+scale=8/r", _DEFAULT),
}
_PAPER_STRUCTURES = {
    "standard": "standard+scale=8/r",
    "mlr": _MLR,
    "swa": "swa:128+scale=8/r",
    "gswa": "gswa:128|32+scale=8/r",
}
_CONTEXT: Mapping[Scale, int] = {"small": 256, "paper": 1024}
_LAYERS: Mapping[Scale, int] = {"small": 4, "paper": 6}
_HEAD_DIM: Mapping[Scale, int] = {"small": 32, "paper": 64}
_STEPS: Mapping[Scale, int] = {"small": 8_000, "paper": 100_000}

Count = Callable[[LanguageModel, int], int]
"""A count of the FLOPs of one row."""

Curve = tuple[Sequence[float], Sequence[float]]
"""Compute and loss of a run at its evaluations, the loss averaged."""


class Recipe(Study):
    """Figure 4 by the authors' recipe."""

    name = "recipe"
    shows_unfinished = True
    data = TEXT
    scales: ClassVar[Mapping[Scale, str]] = {
        "small": (
            "Models of 4 layers, width 64 and 2 heads on 256 characters of context, 8,000 steps of 8 rows. That is "
            "some 75 tokens per parameter, as theirs at width 768. The rest is their recipe, at two of their rates."
        ),
        "paper": (
            "The authors' recipe: 6 layers, widths 256 to 768, 1,024 characters of context, 100,000 steps of 32 rows, "
            "the rates of their figure."
        ),
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train every structure, at both rates or at that of the paper's figure."""
        if scale == "small":
            wanted = [(name, 64, rate) for rate, names in _SMALL_RATES.items() for name in names]
        else:
            wanted = [
                (_PAPER_STRUCTURES[kind], dim, rate)
                for kind, rates in PAPER_RATES.items()
                for dim, rate in rates.items()
            ]
        return with_seeds([_trial(name, data, scale, dim, rate) for name, dim, rate in wanted], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot loss against compute on both axes, each structure at its best rate."""
        with styled():
            figure = new_figure(7.6, 3.4)
            first = None
            for index, (count, label) in enumerate(((authors_flops, AUTHORS), (visible_pair_flops, VISIBLE_PAIRS))):
                axes = first = figure.add_subplot(1, 2, index + 1, sharey=first)
                shown = _at_best_rates(outcomes)
                for structure, pen in pens([str(name) for name in label_values(shown, "structure")]).items():
                    for number, outcome in enumerate(with_label(shown, structure=structure)):
                        compute, losses = _curve(outcome, count)
                        late = slice(len(compute) // 4, None)  # the first quarter is far above
                        label_once = structure if number == 0 else None
                        axes.plot(compute[late], losses[late], color=pen.colour, linestyle=pen.dash, label=label_once)
                axes.set(xlabel=two_lines(label))
                if index == 0:
                    axes.set_ylabel(LOSS)
                    axes.legend(frameon=False, fontsize=7)
        return figure

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Return losses at equal tokens and at equal compute on both axes, and the cost of a row."""
        lines = [
            "| structure | rate | loss at equal tokens | equal FLOPs, authors' count | equal FLOPs, visible pairs |"
            " FLOPs of a row, authors' count | of training on a row, visible pairs | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        width = max((int(each.labels["width"]) for each in outcomes), default=0)
        shown = _whole(with_label(outcomes, width=width))
        columns = [_losses(shown, count) for count in (_tokens, authors_flops, visible_pair_flops)]
        for (structure, rate), tokens in columns[0].items():
            model = _model(structure, width)
            length = model.config.context_length
            costs = [f"{count(model, length):.4g}" for count in (authors_flops, visible_pair_flops)]
            losses = [format_estimate(column[structure, rate]) for column in columns]
            name = structure.replace("|", ",")
            lines.append(f"| `{name}` | {rate:g} | {' | '.join(losses)} | {' | '.join(costs)} | {tokens.count} |")
        return "\n".join([*lines, *_unfinished_lines(outcomes)])

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Judge the paper's form by the rule of this module."""
        words, answers = [], list[bool | None]()
        for width in label_values(outcomes, "width"):
            by_rate = _losses(_whole(with_label(outcomes, width=width)), authors_flops)
            losses = {name: by_rate[name, rate] for name, rate in _best_rates(by_rate).items()}
            if not losses:
                continue
            words.append(f"Loss at width {width} and equal FLOPs by the authors' count: {ranked(losses)}.")
            words.append(describe_resolution(losses.values()))
            others = [each for name, each in losses.items() if name not in (_MLR, _DEFAULT)]
            answers += [is_lower(losses[_MLR], each, losses.values()) for each in others] if _MLR in losses else [None]
            if all(each.count == 1 for each in losses.values()):
                words.append(f"Single runs elsewhere differ by up to {_SINGLE_RUNS} nats by chance.")
        return Finding(" ".join(words) or "No trial ended.", all_true(answers))


def _trial(structure: str, data: str, scale: Scale, dim: int, rate: float) -> Trial:
    """Return a run by the recipe."""
    context = _CONTEXT[scale]
    sizes = recipe_sizes(_LAYERS[scale], dim, dim // _HEAD_DIM[scale])
    train = recipe_training(_STEPS[scale], 8 if scale == "small" else 32, rate)
    config = RunConfig(structure, LanguageConfig(data, context, 65_536), sizes, train, standard_kernel="auto")
    return Trial(config, {"structure": structure, "width": dim, "learning_rate": rate})


def _model(structure: str, width: int) -> LanguageModel:
    """Return an untrained model of the recipe, to count its FLOPs."""
    scale: Scale = "small" if width == 64 else "paper"
    sizes = {"layers": _LAYERS[scale], "heads": width // _HEAD_DIM[scale], "context_length": _CONTEXT[scale]}
    return LanguageModel(LanguageModelConfig(attention=structure, dim=width, **sizes))


def _tokens(model: LanguageModel, length: int) -> int:
    """Return the tokens of a row, as a count of compute."""
    return length


def _curve(outcome: Outcome, count: Count) -> Curve:
    """Return compute and averaged loss of a run at its evaluations."""
    model = _model(str(outcome.labels["structure"]), int(outcome.labels["width"]))
    length = model.config.context_length
    per_token = count(model, length) / length
    losses = [metric(row) for row in outcome.rows]
    averaged = [statistics.fmean(losses[max(0, last - _AVERAGED) : last]) for last in range(1, len(losses) + 1)]
    return [per_token * row["tokens"] for row in outcome.rows], averaged


def _losses(outcomes: Sequence[Outcome], count: Count) -> dict[tuple[str, float], Estimate]:
    """Return the loss of each structure and rate at equal compute, by step 1 of the rule."""
    curves = [(each, _curve(each, count)) for each in outcomes if each.rows]
    least = min((compute[-1] for _, (compute, _) in curves), default=0.0)
    at: dict[tuple[str, float], list[float]] = {}
    for outcome, (compute, losses) in curves:
        key = str(outcome.labels["structure"]), float(outcome.labels["learning_rate"])
        at.setdefault(key, []).append(float(np.interp(least, compute, losses)))
    return {key: Estimate.of(values) for key, values in at.items()}


def _whole(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that were not cut short."""
    return [each for each in outcomes if not _is_unfinished(each)]


def _is_unfinished(outcome: Outcome) -> bool:
    return outcome.labels.items() >= UNFINISHED.items()


def _unfinished_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table of the runs that have not ended, beside whole runs of the same width, rate and tokens."""
    lines = []
    for outcome in filter(_is_unfinished, outcomes):
        tokens, losses = _curve(outcome, _tokens)
        here = with_label(
            _whole(outcomes), **{name: outcome.labels[name] for name in ("width", "learning_rate", "seed")}
        )
        others = [f"`{each.labels['structure']}` {np.interp(tokens[-1], *_curve(each, _tokens)):.3f}" for each in here]
        name = (
            f"`{outcome.labels['structure']}`, rate {outcome.labels['learning_rate']:g}, seed {outcome.labels['seed']}"
        )
        row = f"| {name} | {outcome.rows[-1]['step']:,} | {losses[-1]:.3f} | {', '.join(others)} |"
        lines.append(row.replace("gswa:128|32", "gswa:128,32"))
    if not lines:
        return []
    heading = ["", "Runs that were cut short, not judged:", "", "| run | steps | loss | others after as many tokens |"]
    return [*heading, "|---|---|---|---|", *lines]


def _best_rates(losses: Mapping[tuple[str, float], Estimate]) -> dict[str, float]:
    """Return the rate of lowest mean loss by structure."""
    ordered = sorted(losses, key=lambda key: losses[key].mean, reverse=True)
    return dict(ordered)  # of equal names the last one stays, which is the lowest


def _at_best_rates(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs of each width and structure at the best rate, also those that have not ended."""
    kept: list[Outcome] = []
    for width in label_values(outcomes, "width"):
        here = with_label(outcomes, width=width)
        best = _best_rates(_losses(_whole(here), authors_flops))
        for name, rate in best.items():
            kept += [each for each in with_label(here, structure=name, learning_rate=rate) if each.rows]
        kept += [each for each in here if _is_unfinished(each) and each.labels["structure"] not in best]
    return kept
