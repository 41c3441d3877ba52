"""In-context regression: error by rank, width and compute (figures 2, 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from paper.drawing import plot_curves, plot_estimates
from paper.evidence import (
    all_true,
    describe_resolution,
    estimates,
    estimates_by,
    format_estimate,
    is_lower,
    label_values,
    pooled_margin,
    ranked,
)
from paper.study import Finding, Label, Outcome, Scale, Study, Trial, metric, with_seeds
from structattn.comparison.estimate import Estimate
from structattn.comparison.run import ModelSizes, RunConfig
from structattn.tasks import RegressionConfig
from structattn.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADS = 8

_ERROR = "squared error / d at the last position"

# Batch 64 and no weight decay, as in the paper's code.
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
# Share of the steps with easier prompts; a short run needs a larger one.
_CURRICULUM: dict[Scale, float] = {"small": 0.4, "paper": 0.06}


def trial(scale: Scale, structure: str, dim: int, input_dim: int) -> Trial:
    """Return the trial of one model on in-context regression of `input_dim` dimensions."""
    task = RegressionConfig(input_dim, _CURRICULUM[scale])
    config = RunConfig(structure, task, ModelSizes(_LAYERS[scale], dim, _HEADS), _TRAINING[scale])
    heads = 1 if structure == "standard:1" else _HEADS
    labels: dict[str, Label] = {"structure": structure, "width": dim, "head_rank": dim // heads, "input_dim": input_dim}
    return Trial(config, labels)


class Bottleneck(Study):
    """Figure 2: error against head rank."""

    name = "bottleneck"
    scales = _SCALES

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Vary the width, so that head ranks lie around the input dimension."""
        inputs = {"small": (6,), "paper": (16, 32, 64, 128)}[scale]
        widths = {"small": (16, 32, 48, 64), "paper": (16, 32, 64, 128, 256, 512, 1024)}[scale]
        return with_seeds([trial(scale, "standard", dim, d) for d in inputs for dim in widths], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot error against head rank, one line per input dimension."""
        return plot_estimates(
            {f"d = {d}": _errors_by_rank(outcomes, d) for d in label_values(outcomes, "input_dim")},
            xlabel="head rank / input dimension, r / d",
            ylabel=_ERROR,
            vertical_line=1.0,
        )

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Compare errors at low and full rank, for the largest inputs."""
        d = max(int(value) for value in label_values(outcomes, "input_dim"))
        points = _errors_by_rank(outcomes, d)
        low_rank = [each for ratio, each in points if ratio <= 0.5]
        full_rank = [each for ratio, each in points if ratio >= 1.0]
        if not low_rank or not full_rank:
            return Finding("Too few trials ended to compare ranks below and above d.")
        errors = ", ".join(f"{format_estimate(each)} at rank {ratio * d:.0f}" for ratio, each in points)
        groups = [each for _, each in points]
        statement = f"Error at d = {d}: {errors}. {describe_resolution(groups)}"
        agrees = all_true([is_lower(full, low, groups) for full in full_rank for low in low_rank])
        return Finding(statement, agrees)


class Width(Study):
    """Figure 3a: error against width."""

    name = "width"
    scales = _SCALES

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train three structures at every width."""
        d, widths = {"small": (6, (16, 32, 48)), "paper": (64, (32, 64, 128, 256, 512, 1024))}[scale]
        structures = ("standard", "standard:1", "btt")
        return with_seeds([trial(scale, name, dim, d) for dim in widths for name in structures], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the error against the width."""
        lines = {
            str(name): estimates_by(outcomes, "width", structure=name) for name in label_values(outcomes, "structure")
        }
        return plot_estimates(lines, xlabel="model width D", ylabel=_ERROR, log_x=True)

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Find the smallest width at which each structure solves the task.

        There its error is within the spread of the lowest one, at 95%.
        """
        table = estimates(outcomes, "width", "structure")
        names = ("standard", "standard:1", "btt")
        if not all(any(name == known for _, known in table) for name in names):
            return Finding("Too few trials ended to compare the structures.")
        lowest = min(table.values(), key=lambda each: each.mean)
        solved, listed = {}, []
        for name in names:
            errors = {width: each for (width, known), each in sorted(table.items()) if known == name}
            good = [float(width) for width, each in errors.items() if not is_lower(lowest, each, table.values())]
            solved[name] = min(good, default=math.inf)
            at_widths = ", ".join(f"{format_estimate(each)} at D = {width}" for width, each in errors.items())
            listed.append(f"{name} {at_widths}")
        widths = ", ".join(
            f"{name} {'none' if math.isinf(width) else f'D = {width:g}'}" for name, width in solved.items()
        )
        statement = (
            f"Error by structure and width: {'; '.join(listed)}. Smallest width whose error cannot be told from the "
            f"lowest of all: {widths}. {describe_resolution(table.values())}"
        )
        if math.isinf(pooled_margin(table.values(), lowest, lowest)):
            return Finding(statement)
        return Finding(statement, solved["btt"] <= solved["standard:1"] < solved["standard"])


class Compute(Study):
    """Figure 3b: error against training compute."""

    name = "compute"
    scales = _SCALES | {
        "small": f"{_SCALES['small']} The learning rate falls to 0 at the last step. At equal FLOPs it is still higher "
        "for structures whose steps cost more."
    }

    def trials(self, scale: Scale, data: str, seeds: int) -> list[Trial]:
        """Train four structures at one width."""
        d, dim, ranks = {"small": (6, 32, "2|1|1"), "paper": (64, 256, "16|8|4|4")}[scale]
        structures = ("standard", "standard:1", f"bmlr:{ranks}", "btt")
        return with_seeds([trial(scale, name, dim, d) for name in structures], seeds)

    def draw(self, outcomes: Sequence[Outcome]) -> Figure:
        """Plot the error of every evaluation against FLOPs."""
        return plot_curves(outcomes, ylabel=_ERROR)

    def finding(self, outcomes: Sequence[Outcome]) -> Finding:
        """Compare the structures at the largest compute that all of them reached."""
        shared = min((outcome.flops for outcome in outcomes if outcome.rows), default=0.0)
        means = _errors_at(outcomes, shared)
        if "standard" not in means or len(means) < 2:
            return Finding("Too few trials ended to compare structures at equal compute.")
        final = {str(name): each for (name,), each in estimates(outcomes, "structure").items()}
        statement = (
            f"Error at {shared:.2g} training FLOPs: {ranked(means)}. Error after all steps: {ranked(final)}. "
            f"{describe_resolution(means.values())}"
        )
        others = [each for name, each in means.items() if name not in ("standard", "standard:1")]
        agrees = all_true([is_lower(each, means["standard"], means.values()) for each in others])
        return Finding(statement, agrees)


def _errors_by_rank(outcomes: Sequence[Outcome], input_dim: Label) -> list[tuple[float, Estimate]]:
    """Return the error by head rank / input dimension."""
    points = estimates_by(outcomes, "head_rank", input_dim=input_dim)
    return [(rank / float(input_dim), each) for rank, each in points]


def _errors_at(outcomes: Sequence[Outcome], flops: float) -> dict[str, Estimate]:
    """Return each structure's error at its last evaluation within `flops`."""
    errors: dict[str, list[float]] = {}
    for outcome in outcomes:
        rows = [row for row in outcome.rows if row["flops"] <= flops * 1.001]
        if rows:
            errors.setdefault(str(outcome.labels["structure"]), []).append(metric(rows[-1]))
    return {name: Estimate.of(values) for name, values in errors.items()}
