"""Define the settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from structattn import checks
from structattn.tasks.profiles.profile import ABSENT_AT_DEFAULT
from structattn.training.precision import Precision
from structattn.training.schedule import Schedule

BUDGETS = ("steps", "tokens", "flops", "minutes")
"""Fields of `TrainConfig` that set a budget; exactly one is given."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Exactly one budget (steps, tokens, flops or minutes) is set.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    steps: int | None = None
    """Budget: optimiser steps."""

    tokens: int | None = None
    """Budget: tokens trained on."""

    flops: float | None = None
    """Budget: training FLOPs, forward and backward. The paper compares structures at equal FLOPs."""

    minutes: float | None = None
    """Budget: minutes of training, without evaluations. Such a run is not reproducible to the bit."""

    batch_size: int = 16
    """Sequences per step, over all processes and micro-batches."""

    micro_batches: int = 1
    """Gradient accumulation: parts into which a process splits its rows of a batch, to save memory."""

    learning_rate: float = 2e-3
    """Peak rate of AdamW. With muP, matrices whose fan-in grows with the width have another: see `mup`."""

    schedule: Schedule = "cosine"
    """Rate after the warm-up: `constant`, or `cosine` down to `final_rate`."""

    warmup: float = 0.05
    """Share of the budget during which the rate rises linearly from zero to its peak."""

    final_rate: float = 0.0
    """Rate at the end of the cosine, divided by the peak rate."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; embeddings and norms have none."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moment estimates."""

    epsilon: float = field(default=1e-8, metadata={ABSENT_AT_DEFAULT: True})
    """Number that AdamW adds to the root of its second moment."""

    norm_rate: float = field(default=1.0, metadata={ABSENT_AT_DEFAULT: True})
    """Rate of the norms' gains, divided by `learning_rate`."""

    clip: float = 1.0
    """Maximum norm of the whole gradient; 0 turns clipping off."""

    mup: bool = True
    """Scale the rate of matrices whose fan-in grows with the width: `learning_rate · base_dim / fan_in`."""

    base_dim: int = 256
    """Width at which muP's rates equal the standard ones."""

    precision: Precision = "auto"
    """Dtype of matrix products: `float32`, `bfloat16`, or `auto`: bfloat16 if the device has instructions for it.
    Weights, optimiser state and loss are float32."""

    compile: bool = False
    """Compile the model with `torch.compile`."""

    evaluation_interval: int | None = None
    """Steps between evaluations, each followed by a checkpoint. By default there are at most 20 evaluations, which
    cost at most 4% of the run."""

    seed: int = 0
    """Seed of dropout; the task and the initial weights have their own."""

    cpu: bool = False
    """Train on the CPU even if there is an accelerator."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Services that receive the metrics, besides metrics.jsonl."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(BUDGETS)} must be set, got {' and '.join(given) or 'none'}")
        for name in ("steps", "tokens", "evaluation_interval"):
            if getattr(self, name) is not None:
                checks.positive_int(name, getattr(self, name))
        for name in ("flops", "minutes", "learning_rate", "epsilon", "norm_rate"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        for name in ("batch_size", "micro_batches", "base_dim"):
            checks.positive_int(name, getattr(self, name))
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size must be a multiple of micro_batches {self.micro_batches}, got {self.batch_size}"
            )
        checks.probability("warmup", self.warmup)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        for index, beta in enumerate(self.betas):
            checks.probability(f"betas[{index}]", beta)
        for name in ("weight_decay", "clip"):
            if checks.finite(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= checks.finite("final_rate", self.final_rate) <= 1.0:
            raise ValueError(f"final_rate must be between 0 and 1, got {self.final_rate}")
        checks.one_of("schedule", self.schedule, get_args(Schedule))
        checks.one_of("precision", self.precision, get_args(Precision))
        for name in self.trackers:
            checks.one_of("trackers", name, ("tensorboard", "wandb"))

    @property
    def budget(self) -> str:
        """Name of the budget that is set."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)
