"""Tasks: data, loss and metrics of each, for models and training that know nothing else about them."""

from __future__ import annotations

from structattn.tasks.base import Batch, Task, Totals
from structattn.tasks.regression import RegressionConfig, RegressionTask

__all__ = ["Batch", "RegressionConfig", "RegressionTask", "Task", "Totals"]
