"""One run of Chronos: a T5 with a given self-attention, trained from scratch on synthetic series."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from paper.chronos.task import ChronosDataConfig, ChronosTask
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
    """Training of a Chronos-T5, whose initial deviations are not muP's, evaluated twenty times on the way."""
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,
        mup=False,
        precision=precision,
        # The loop's own choice, by the cost of an evaluation, leaves short runs a handful of points.
        evaluation_interval=-(-steps // 20),
    )


@dataclass(frozen=True)
class ChronosRunConfig:
    """All that defines a run, with what `structattn.comparison.run.execute` asks of a config.

    Raises:
        ValueError: the budget is not one of steps or tokens: with those, every attention reads the same.
    """

    attention: str = "standard"
    """Spelling, as `structattn.integrations.chronos.set_attention` takes it."""

    size: str | tuple[int, int, int, int, int] = REDUCED
    """`tiny`, `mini`, `small`, or d_model, layers, heads, d_ff and d_kv."""

    context_length: int = 256
    """Values that a forecast is made from."""

    prediction_length: int = 32
    """Values to forecast."""

    n_tokens: int = 1024
    """Bins of the tokenizer and special ids."""

    dropout: float = 0.0
    """Share dropped in training."""

    initializer_factor: float = 1.0
    """Of T5's initial deviations; Chronos as published has 0.05."""

    data: ChronosDataConfig = field(default_factory=ChronosDataConfig)
    """Synthetic series."""

    train: TrainConfig = field(default_factory=lambda: chronos_training(800))
    """Budget and optimiser."""

    seed: int = 0
    """Names the weights, the training series and their order."""

    def __post_init__(self) -> None:
        if self.train.budget not in ("steps", "tokens"):
            raise ValueError(f"train must have a budget of steps or tokens, equal for all, got {self.train.budget}")

    @property
    def row_length(self) -> int:
        """Ids of a row: context and future, each with its end token."""
        return self.context_length + self.prediction_length + 2

    def build_pipeline(self) -> ChronosPipeline:
        """The fresh model as Chronos has it; equal weights for every attention.

        Raises:
            ImportError: without Chronos, naming the extra that brings it.
            TypeError, ValueError: sizes or attention that do not fit each other.
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
        """The same as the training loop takes it: no such model, but with the few members that are asked for."""
        from structattn.integrations.chronos import ChronosLearner

        return cast("StructuredModel", ChronosLearner(self.build_pipeline()))

    def build_task(self, total_steps: int) -> ChronosTask:
        """The task, the same for every number of steps."""
        from structattn.integrations.chronos import chronos_settings

        settings = chronos_settings(self.context_length, self.prediction_length, self.n_tokens)
        return ChronosTask(settings, self.data, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON knows."""
        plain = dataclasses.asdict(self)
        plain["size"] = self.size if isinstance(self.size, str) else list(self.size)
        plain["train"]["betas"], plain["train"]["trackers"] = list(self.train.betas), list(self.train.trackers)
        return plain
