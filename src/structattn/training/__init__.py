"""Training: one call that trains a model on a task under a budget, muP, checkpoints that survive being killed."""

from __future__ import annotations

from structattn.training.budget import MakeTask
from structattn.training.config import TrainConfig
from structattn.training.errors import NonFiniteLossError, RunFolderError, TrainingError
from structattn.training.loop import TrainResult, train
from structattn.training.metrics import WALL_CLOCK, MetricsFile, Row
from structattn.training.presets import FORECAST_PRESETS, PRESETS, Preset, preset
from structattn.training.progress import Progress, StepReport

__all__ = [
    "FORECAST_PRESETS",
    "PRESETS",
    "WALL_CLOCK",
    "MakeTask",
    "MetricsFile",
    "NonFiniteLossError",
    "Preset",
    "Progress",
    "Row",
    "RunFolderError",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "preset",
    "train",
]
