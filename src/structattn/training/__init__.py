"""Train a model on a task under a budget; resume it exactly."""

from __future__ import annotations

from structattn.layers.deprecation import serve_old_names
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

__getattr__ = serve_old_names(__name__, {"Row": "MetricsRow"})
