"""In-context regression: what rank a score needs, and what it costs to have it (figures 2 and 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper.drawing import curves, estimate_lines
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
    metric,
    resolution,
    show,
    with_seeds,
)
from structattn.studies.estimate import Estimate, pooled_margin
from structattn.studies.run import ModelSizes, RunConfig
from structattn.tasks import RegressionConfig
from structattn.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADS = 8

# Steps, learning rate, layers and curriculum; batch 64 and no decay as in the paper (design: its code, appendix).
_SHARED = TrainConfig(steps=1, batch_size=64, weight_decay=0.0, mup=False)
_TRAINING: dict[Scale, TrainConfig] = {
    "small": dataclasses.replace(_SHARED, steps=4_000, learning_rate=2e-3, precision="float32"),
    "paper": dataclasses.replace(_SHARED, steps=500_000, learning_rate=1e-4, schedule="constant", warmup=0.002),
}
_SCALES: dict[Scale, str] = {
    "small": "Inputs of 6 dimensions, models of 4 layers and 8 heads, 4,000 steps of 64 prompts.",
    "paper": "Inputs of 16 to 128 dimensions, models of 6 layers and 8 heads, 500,000 steps of 64 prompts.",
}
_LAYERS: dict[Scale, int] = {"small": 4, "paper": 6}
# A short training must not leave the easy prompts before anything is learned from them.
_CURRICULUM: dict[Scale, float] = {"small": 0.4, "paper": 0.06}


def trial(scale: Scale, structure: str, dim: int, input_dim: int) -> Trial:
    """One model on in-context regression of `input_dim` dimensions."""
    task = RegressionConfig(input_dim, _CURRICULUM[scale])
    config = RunConfig(structure, task, ModelSizes(_LAYERS[scale], dim, _HEADS), _TRAINING[scale])
    heads = 1 if structure == "standard:1" else _HEADS
    labels: dict[str, Label] = {"structure": structure, "width": dim, "head_rank": dim // heads, "input_dim": input_dim}
    return Trial(config, labels)


class Bottleneck(Study):
    """Figure 2."""

    name = "bottleneck"
    title = "The low-rank bottleneck"
    question = (
        "How large must a head of standard attention be to compare inputs of d dimensions? Its score has rank "
        "r = D/8, and in-context regression needs inner products of whole inputs."
    )
    reported = "Standard attention with 8 heads fails until the head rank reaches the input dimension, D/8 ≈ d."
    figure = "figure 2"
    scales = _SCALES

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Widths from a head rank well below the input dimension to one above it."""
        inputs = {"small": (6,), "paper": (16, 32, 64, 128)}[scale]
        widths = {"small": (16, 32, 48, 64), "paper": (16, 32, 64, 128, 256, 512, 1024)}[scale]
        return with_seeds([trial(scale, "standard", dim, d) for d in inputs for dim in widths], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Error against head rank over input dimension, a line for each input dimension."""
        return estimate_lines(
            {
                f"d = {d}": [(key[0] / d, each) for key, each in _by(outcomes, "head_rank", input_dim=d)]
                for d in _values(outcomes, "input_dim")
            },
            xlabel="head rank / input dimension, r / d",
            ylabel="squared error / d at the last position",
            mark=1.0,
        )

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """The error below and at full rank."""
        d = max(_values(outcomes, "input_dim"))
        points = [(key[0] / d, each) for key, each in _by(outcomes, "head_rank", input_dim=d)]
        low_rank = [each for ratio, each in points if ratio <= 0.5]
        full_rank = [each for ratio, each in points if ratio >= 1.0]
        if not low_rank or not full_rank:
            return Finding("Too few trials ended to compare ranks below and above d.")
        said = ", ".join(f"{show(each)} at {ratio * d:.0f}" for ratio, each in points)
        groups = [each for _, each in points]
        statement = f"At d = {d} the error by head rank is {said}. {resolution(groups)}"
        agrees = all_of([below(groups, full, low) for full in full_rank for low in low_rank])
        return Finding(statement, agrees)


class Width(Study):
    """Figure 3a."""

    name = "width"
    title = "Which width does a structure need?"
    question = (
        "At which model width does each structure solve in-context regression: 8 heads of rank D/8, one head of rank "
        "D, or 8 heads of full rank by a Block Tensor Train?"
    )
    reported = (
        "8-head BTT solves the task at the width at which 1-head standard attention does; 8-head standard needs more."
    )
    figure = "figure 3a"
    scales = _SCALES

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Three structures over widths."""
        d, widths = {"small": (6, (16, 32, 48)), "paper": (64, (32, 64, 128, 256, 512, 1024))}[scale]
        structures = ("standard", "standard:1", "btt")
        return with_seeds([trial(scale, name, dim, d) for dim in widths for name in structures], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Error against width."""
        lines = {
            str(name): [(key[0], each) for key, each in _by(outcomes, "width", structure=name)]
            for name in _values(outcomes, "structure")
        }
        return estimate_lines(
            lines, xlabel="model width D", ylabel="squared error / d at the last position", log_x=True
        )

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """From which width on each structure's error is within the 95% interval of the lowest of all."""
        table = estimates(outcomes, "width", "structure")
        names = ("standard", "standard:1", "btt")
        if not all(any(name == known for _, known in table) for name in names):
            return Finding("Too few trials ended to compare the structures.")
        lowest = min(table.values(), key=lambda each: each.mean)
        solved, said = {}, []
        for name in names:
            errors = {width: each for (width, known), each in sorted(table.items()) if known == name}
            good = [width for width, each in errors.items() if not below(table.values(), lowest, each)]
            solved[name] = float(min(good, default=math.inf))
            at = ", ".join(f"{show(each)} at D = {width}" for width, each in errors.items())
            said.append(f"{name} {at}: {f'from D = {good[0]} on' if good else 'at none'}")
        statement = (
            f"Errors, and where they cannot be told from the lowest: {'; '.join(said)}. {resolution(table.values())}"
        )
        if math.isinf(pooled_margin(table.values(), lowest, lowest)):
            return Finding(statement)
        return Finding(statement, solved["btt"] <= solved["standard:1"] < solved["standard"])


class Compute(Study):
    """Figure 3b."""

    name = "compute"
    title = "Error against training compute at one width"
    question = "At equal training compute and width, which structure has the lower error?"
    reported = "BTT and MLR with 8 heads reach a lower error for the same FLOPs than standard attention with 8 heads."
    figure = "figure 3b"
    scales = _SCALES | {
        "small": f"{_SCALES['small']} The rate falls to 0 at the end: at equal FLOPs it has not yet fallen as far for "
        "structures whose steps cost more."
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Four structures at one width."""
        d, dim, ranks = {"small": (6, 32, "2|1|1"), "paper": (64, 256, "16|8|4|4")}[scale]
        structures = ("standard", "standard:1", f"bmlr:{ranks}", "btt")
        return with_seeds([trial(scale, name, dim, d) for name in structures], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Error against FLOPs, every evaluation."""
        return curves(outcomes, "structure", ylabel="squared error / d at the last position")

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Each structure at the largest compute that all reached."""
        shared = min((outcome.flops for outcome in outcomes if outcome.rows), default=0.0)
        reached: dict[str, list[float]] = {}
        for outcome in outcomes:
            rows = [row for row in outcome.rows if row["flops"] <= shared * 1.001]
            if rows:
                reached.setdefault(str(outcome.labels["structure"]), []).append(metric(rows[-1]))
        means = {name: Estimate.of(values) for name, values in reached.items()}
        if "standard" not in means or len(means) < 2:
            return Finding("Too few trials ended to compare structures at equal compute.")
        ends = {str(name): each for (name,), each in estimates(outcomes, "structure").items()}
        statement = (
            f"At {shared:.2g} training FLOPs: {_ranked(means)}. After all steps: {_ranked(ends)}. "
            f"{resolution(means.values())}"
        )
        others = [each for name, each in means.items() if name not in ("standard", "standard:1")]
        agrees = all_of([below(means.values(), each, means["standard"]) for each in others])
        return Finding(statement, agrees)


def _ranked(means: Mapping[str, Estimate]) -> str:
    return ", ".join(f"{name} {show(each)}" for name, each in sorted(means.items(), key=lambda pair: pair[1].mean))


def _values(outcomes: Iterable[Outcome], name: str) -> list[Any]:
    return list(dict.fromkeys(outcome.labels[name] for outcome in outcomes))


def _by(outcomes: Iterable[Outcome], name: str, **fixed: object) -> list[Any]:
    """Estimates by one label where others are fixed, in ascending order."""
    chosen = [each for each in outcomes if all(each.labels[key] == value for key, value in fixed.items())]
    return sorted(estimates(chosen, name).items())
