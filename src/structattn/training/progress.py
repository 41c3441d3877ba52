"""What a run tells while it goes: the command line draws it, the library prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from structattn.training.metrics import Row


@dataclass(frozen=True)
class StepReport:
    """Where a run stands, some ten times per evaluation or more."""

    step: int
    """Steps done."""

    total_steps: int
    """Steps of the whole run; an estimate where the budget is minutes."""

    fraction: float
    """Share of the budget that is spent, in [0, 1]."""

    loss: float
    """Mean training loss of the steps since the report before."""

    tokens_per_second: float
    """Tokens trained on per second of training since the run began or was resumed."""

    seconds_left: float
    """Estimate of the training time left, without evaluations."""


class Progress:
    """Called by `train` on the main process; override what is of interest."""

    def on_start(self, step: int, total_steps: int, damaged: tuple[Path, ...]) -> None:
        """The run begins after `step` steps (0, or those of a checkpoint); `damaged` checkpoints were skipped."""

    def on_step(self, report: StepReport) -> None:
        """Some steps were done."""

    def on_evaluation(self, row: Row) -> None:
        """An evaluation was written to the metrics."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint was written."""

    def on_end(self, row: Row) -> None:
        """The run is done; `row` is the last evaluation."""
