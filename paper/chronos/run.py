"""Config of a Chronos-T5 trained from scratch on synthetic series."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from paper.chronos.attention import label, spelling
from paper.chronos.task import ChronosDataConfig, ChronosTask
from structattn.comparison import files
from structattn.comparison.run import stored_fields
from structattn.training import TrainConfig
from structattn.training.precision import Precision

if TYPE_CHECKING:
    from chronos import ChronosPipeline

    from structattn.models import StructuredModel

REDUCED = (64, 2, 2, 256, 32)
"""d_model, layers, heads, d_ff and d_kv of a model that a CPU trains in minutes."""


def chronos_training(
    steps: int, *, batch_size: int = 16, learning_rate: float = 3e-3, precision: Precision = "float32"
) -> TrainConfig:
    """Return the training config of a Chronos-T5: no muP, twenty evaluations."""
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,
        mup=False,
        precision=precision,
        # The loop's default interval gives short runs only a few evaluations.
        evaluation_interval=-(-steps // 20),
    )


@dataclass(frozen=True)
class ChronosRunConfig:
    """Config of one run, with the members that `structattn.comparison.run.execute` uses.

    Raises:
        ValueError: a T5 cannot have the attention, or the budget is in FLOPs or minutes, in which attentions would
            read different rows.
    """

    attention: str = spelling("standard")
    """Spelling of the attention, see `structattn.integrations.chronos.set_attention`."""

    size: str | tuple[int, int, int, int, int] = REDUCED
    """`tiny`, `mini`, `small`, or d_model, layers, heads, d_ff and d_kv."""

    context_length: int = 256
    """Values of a context."""

    prediction_length: int = 32
    """Values of a forecast."""

    n_tokens: int = 1024
    """Bins of the tokenizer and special ids."""

    dropout: float = 0.0
    """Dropout rate in training."""

    initializer_factor: float = 1.0
    """Factor on T5's initial deviations; published Chronos models have 0.05."""

    data: ChronosDataConfig = field(default_factory=ChronosDataConfig)
    """Sizes of the synthetic data."""

    train: TrainConfig = field(default_factory=lambda: chronos_training(800))
    """Budget and optimiser."""

    seed: int = 0
    """Seed of the weights, the training series and their order."""

    def __post_init__(self) -> None:
        label(self.attention)
        if self.train.budget not in ("steps", "tokens"):
            raise ValueError(f"train must have a budget of steps or tokens, equal for all, got {self.train.budget}")

    @property
    def label(self) -> str:
        """Label of the attention, see `paper.chronos.attention`."""
        return label(self.attention)

    @property
    def folder(self) -> str:
        """Name of the run's folder in a study, such as `mlr-16-16-seed0`."""
        return f"{files.safe_name(self.label.replace(',', '-'))}-seed{self.seed}"

    @property
    def row_length(self) -> int:
        """Ids of a row: context and future, each with an end token."""
        return self.context_length + self.prediction_length + 2

    def build_pipeline(self) -> ChronosPipeline:
        """Return the untrained model as a pipeline.

        The initial weights do not depend on the attention.

        Raises:
            ImportError: without Chronos, naming the extra that brings it.
            TypeError, ValueError: sizes and attention do not fit each other.
        """
        from structattn.integrations.chronos import ChronosSize, make_chronos

        return make_chronos(
            self.size if isinstance(self.size, str) else ChronosSize(*self.size),
            self.attention,
            context_length=self.context_length,
            prediction_length=self.prediction_length,
            n_tokens=self.n_tokens,
            dropout=self.dropout,
            initializer_factor=self.initializer_factor,
            seed=self.seed,
        )

    def build_model(self) -> StructuredModel:
        """Return the untrained model, with the members that the training loop uses."""
        from structattn.integrations.chronos import ChronosLearner

        return cast("StructuredModel", ChronosLearner(self.build_pipeline()))

    def build_task(self, total_steps: int) -> ChronosTask:
        """Return the task; it does not depend on the number of steps."""
        from structattn.integrations.chronos import chronos_settings

        settings = chronos_settings(self.context_length, self.prediction_length, self.n_tokens)
        return ChronosTask(settings, self.data, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, the attention by its label."""
        plain = dataclasses.asdict(self) | {"attention": self.label}
        plain["size"] = self.size if isinstance(self.size, str) else list(self.size)
        plain["train"] = stored_fields(self.train)
        return plain
