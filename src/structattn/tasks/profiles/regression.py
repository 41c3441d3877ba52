"""Define settings and profile of in-context linear regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from structattn import checks
from structattn.drawing.style import BASELINE, QUIET, label_ends, new_figure, pens
from structattn.tasks.profiles.profile import Findings, Metrics, TaskCommand, TaskFigure, TaskProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from structattn.models import StructuredModel
    from structattn.tasks.regression import RegressionTask

_RIDGE_PENALTY = 1.0

# Two cores train it in under an hour.
_SMALL = {
    "input_dim": 8,
    "layers": 4,
    "dim": 32,
    "heads": 8,
    "steps": 20_000,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "mup": False,
    "weight_decay": 0.0,
}


@dataclass(frozen=True)
class RegressionConfig:
    """Settings of in-context linear regression from twice as many points as dimensions.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    input_dim: int = 16
    """Dimensions d of the inputs. A prompt has 2d points, so a sequence has 4d tokens."""

    curriculum: float = 0.06
    """Share of the steps over which prompts grow from 4 dimensions and 8 points to full size; 0 for no growth."""

    evaluation_prompts: int = 2048
    """Prompts of the held-out set, the same for every seed."""

    def __post_init__(self) -> None:
        checks.positive_int("input_dim", self.input_dim)
        checks.probability("curriculum", self.curriculum)
        checks.positive_int("evaluation_prompts", self.evaluation_prompts)

    @property
    def num_points(self) -> int:
        """Points `N = 2d` of a full prompt."""
        return 2 * self.input_dim

    @property
    def context_length(self) -> int:
        """Tokens `2N = 4d` of a full prompt."""
        return 2 * self.num_points


def _build(config: RegressionConfig, seed: int, total_steps: int) -> RegressionTask:
    from structattn.tasks.regression import RegressionTask

    return RegressionTask(config, seed=seed, total_steps=total_steps)


def _model() -> type[StructuredModel]:
    from structattn.models import RegressionModel

    return RegressionModel


def _baselines(task: RegressionTask) -> dict[str, Metrics]:
    from structattn.tasks.regression_baselines import least_squares_error, ridge_error, zero_error

    errors = {
        "least squares": least_squares_error(task),
        f"ridge ({_RIDGE_PENALTY:g})": ridge_error(task, _RIDGE_PENALTY),
        "zero": zero_error(task),
    }
    # These are per prompt and over d; `metrics` divides by both.
    return {
        name: task.metrics({"squared_error": error * task.config.input_dim, "prompts": error.new_ones(())})
        for name, error in errors.items()
    }


def error_by_position(results: Findings) -> Figure:
    """Draw the final error after each number of points, models against baselines."""
    import numpy as np

    figure = new_figure(6.4, 3.4)
    axes = figure.add_subplot()
    ends = []
    for name, row in results.baselines.items():
        errors = row["error_by_position"]
        axes.plot(range(len(errors)), errors, color=QUIET, linestyle=BASELINE, linewidth=1)
        ends.append((name, len(errors) - 1, errors[-1], QUIET))
    drawn = pens(results.structures)
    for structure in results.ranking:
        pen = drawn[structure]
        errors = np.mean([run.final["error_by_position"] for run in results.finished(structure)], axis=0).tolist()
        axes.plot(range(len(errors)), errors, color=pen.colour, linestyle=pen.dash)
        ends.append((structure, len(errors) - 1, errors[-1], pen.colour))
    points = results.sizes["context_length"] // 2
    axes.axvline(points / 2, color=QUIET, linewidth=0.8)
    axes.text(
        points / 2, 1.0, " as many points as dimensions", color=QUIET, va="top", transform=axes.get_xaxis_transform()
    )
    axes.set(xlabel="points seen before", ylabel="squared error / d", xlim=(0, points - 1), ylim=(0, None))
    figure.canvas.draw()
    label_ends(axes, ends)
    return figure


REGRESSION = TaskProfile(
    name="regression",
    config=RegressionConfig,
    build=_build,
    model=_model,
    model_fields=lambda config: {"input_dim": config.input_dim},
    question="Which attention structures can compare inputs of so many dimensions, and at which cost?",
    setting=(
        "Each prompt shows pairs x, y = wᵀx with a hidden w of its own; the model predicts every y from the pairs "
        "before it. The error is squared and divided by the number of dimensions, so that always answering 0 "
        "costs 1. Least squares is exact once it has seen as many pairs as there are dimensions."
    ),
    quantity="error at the last position",
    short_quantity="error",
    columns={"last_error": "last error", "mean_error": "mean error"},
    baselines=_baselines,
    is_log_scale=True,
    figures=(
        TaskFigure(
            "error-position",
            "Error at every position",
            "Error of the prediction after so many points of the prompt, at the end of training. Least squares is "
            "the best any predictor can do; it is exact once it has seen as many points as there are dimensions.",
            error_by_position,
        ),
    ),
    command=TaskCommand(
        summary="In-context linear regression: which structures can compare high-dimensional inputs.",
        compared=("standard", "standard:1", "btt"),
        trained="btt",
        examples="standard, standard:1 (one head of full rank), btt, bmlr:3,3,3, …",
        presets={"small": _SMALL},
        hidden=("evaluation_prompts",),
    ),
)
