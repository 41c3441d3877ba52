"""Tasks: data, loss and metrics of each, for models and training that know nothing else about them."""

from __future__ import annotations

from structattn.tasks.base import Batch, Task, Totals
from structattn.tasks.forecasting import ForecastConfig, ForecastTask
from structattn.tasks.language import LanguageConfig, LanguageTask
from structattn.tasks.regression import RegressionConfig, RegressionTask

TaskConfig = LanguageConfig | RegressionConfig | ForecastConfig
"""The config of any task."""

__all__ = [
    "Batch",
    "ForecastConfig",
    "ForecastTask",
    "LanguageConfig",
    "LanguageTask",
    "RegressionConfig",
    "RegressionTask",
    "Task",
    "TaskConfig",
    "Totals",
    "build_task",
]


def build_task(config: TaskConfig, *, seed: int = 0, total_steps: int) -> Task:
    """The task that `config` describes, for a run of `total_steps` training steps.

    Raises:
        TypeError: `config` is no task's config.
        ValueError: what the task raises.
    """
    if isinstance(config, LanguageConfig):
        return LanguageTask(config, seed=seed)
    if isinstance(config, RegressionConfig):
        return RegressionTask(config, seed=seed, total_steps=total_steps)
    if isinstance(config, ForecastConfig):
        return ForecastTask(config, seed=seed)
    raise TypeError(f"config must be a LanguageConfig, RegressionConfig or ForecastConfig, got {type(config).__name__}")
