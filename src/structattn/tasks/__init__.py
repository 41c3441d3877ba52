"""Tasks: data, loss, metrics, baselines and figures of each."""

from __future__ import annotations

from structattn.tasks.forecasting import ForecastConfig, ForecastTask
from structattn.tasks.language import LanguageConfig, LanguageTask
from structattn.tasks.profiles import TASKS, TaskFigure, TaskProfile, profile_of
from structattn.tasks.regression import RegressionConfig, RegressionTask
from structattn.tasks.task import Batch, Task, TaskConfig, Totals

__all__ = [
    "TASKS",
    "Batch",
    "ForecastConfig",
    "ForecastTask",
    "LanguageConfig",
    "LanguageTask",
    "RegressionConfig",
    "RegressionTask",
    "Task",
    "TaskConfig",
    "TaskFigure",
    "TaskProfile",
    "Totals",
    "build_task",
    "profile_of",
]


def build_task(config: TaskConfig, *, seed: int = 0, total_steps: int) -> Task:
    """Return the task that `config` describes.

    Raises:
        TypeError: `config` is no task's config.
        ValueError: the config does not fit its data.
    """
    return profile_of(config).build(config, seed, total_steps)
