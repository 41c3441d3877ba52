"""Provide each task's data, loss, metrics, baselines and figures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from structattn.tasks.profiles import TASKS, TaskCommand, TaskFigure, TaskProfile, profile_of
from structattn.tasks.profiles.forecast import ForecastConfig
from structattn.tasks.profiles.language import LanguageConfig
from structattn.tasks.profiles.regression import RegressionConfig

if TYPE_CHECKING:
    from structattn.tasks.forecasting import ForecastTask
    from structattn.tasks.language import LanguageTask
    from structattn.tasks.regression import RegressionTask
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
    "TaskCommand",
    "TaskConfig",
    "TaskFigure",
    "TaskProfile",
    "Totals",
    "build_task",
    "profile_of",
]

_MODULES = {"ForecastTask": "forecasting", "LanguageTask": "language", "RegressionTask": "regression"}


def build_task(config: TaskConfig, *, seed: int = 0, total_steps: int) -> Task:
    """Return the task that `config` describes.

    Raises:
        TypeError: `config` is no task's config.
        ValueError: the config does not fit its data.
    """
    return profile_of(config).build(config, seed, total_steps)


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use, so that `--help` is quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'task')}"), name)
