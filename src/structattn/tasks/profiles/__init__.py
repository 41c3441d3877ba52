"""Register the profiles of all tasks.

A new task is a config, a `Task`, a `TaskProfile` and one line in `TASKS`. Profiles import no torch, so that `--help` is
quick.
"""

from __future__ import annotations

from typing import Any

from structattn import checks
from structattn.tasks.profiles.forecast import FORECAST
from structattn.tasks.profiles.language import LANGUAGE
from structattn.tasks.profiles.profile import Findings, Metrics, TaskCommand, TaskFigure, TaskProfile
from structattn.tasks.profiles.regression import REGRESSION

TASKS: dict[str, TaskProfile] = {
    "language": LANGUAGE,
    "regression": REGRESSION,
    "forecast": FORECAST,
}
"""Every task by its name."""

__all__ = ["TASKS", "Findings", "Metrics", "TaskCommand", "TaskFigure", "TaskProfile", "profile_named", "profile_of"]


def profile_named(name: str) -> TaskProfile:
    """Return the profile of a task.

    Raises:
        ValueError: no task has that name; the message has the nearest one.
    """
    return TASKS[checks.one_of("task", name, TASKS)]


def profile_of(config: Any) -> TaskProfile:
    """Return the profile of a task's config.

    Raises:
        TypeError: `config` is no registered task's config.
    """
    for profile in TASKS.values():
        if isinstance(config, profile.config):
            return profile
    known = [profile.config.__name__ for profile in TASKS.values()]
    raise TypeError(f"config must be a {', '.join(known[:-1])} or {known[-1]}, got {type(config).__name__}")
