"""Train a model on a task under a budget; resume it exactly."""

from __future__ import annotations

import warnings
from typing import Any

from structattn.tasks.presets import FORECAST_PRESETS, PRESETS, Preset, preset
from structattn.training.budget import MakeTask
from structattn.training.config import TrainConfig
from structattn.training.errors import NonFiniteLossError, RunFolderError, TrainingError
from structattn.training.loop import TrainResult, train
from structattn.training.metrics import WALL_CLOCK, MetricsFile, MetricsRow
from structattn.training.progress import Progress, StepReport

__all__ = [
    "FORECAST_PRESETS",
    "PRESETS",
    "WALL_CLOCK",
    "MakeTask",
    "MetricsFile",
    "MetricsRow",
    "NonFiniteLossError",
    "Preset",
    "Progress",
    "RunFolderError",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "preset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "Row":
        warnings.warn("structattn.training.Row is now structattn.training.MetricsRow", DeprecationWarning, stacklevel=2)
        return MetricsRow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
