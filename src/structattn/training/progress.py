"""Report a run to callbacks, with which commands draw progress bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from structattn.training.metrics import MetricsRow


@dataclass(frozen=True)
class StepReport:
    """State of a run after some steps."""

    step: int
    """Steps done."""

    total_steps: int
    """Steps of the whole run; an estimate if the budget is in minutes."""

    fraction: float
    """Share of the budget that is spent, in [0, 1]."""

    loss: float
    """Mean training loss of the steps since the previous report."""

    tokens_per_second: float
    """Training speed since the run was started or resumed."""

    seconds_left: float
    """Estimated training time left, without evaluations."""


class Progress:
    """Callbacks that `train` calls on the main process; override those you need."""

    def on_start(self, step: int, total_steps: int, damaged: tuple[Path, ...]) -> None:
        """Called before training: `step` steps were done, `damaged` checkpoints skipped."""

    def on_step(self, report: StepReport) -> None:
        """Called every ten steps, and before each evaluation."""

    def on_evaluation(self, row: MetricsRow) -> None:
        """Called after an evaluation was appended to metrics.jsonl."""

    def on_checkpoint(self, path: Path) -> None:
        """Called after a checkpoint was written."""

    def on_end(self, row: MetricsRow) -> None:
        """Called at the end of the run, with its last evaluation."""
