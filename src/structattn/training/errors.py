"""Define errors that stop a run, with messages of one line."""

from __future__ import annotations

from pathlib import Path


class TrainingError(RuntimeError):
    """A run cannot continue; what it has written so far is intact."""


class NonFiniteLossError(TrainingError):
    """The training loss or a metric is NaN or infinite.

    Attributes:
        step: training step, counted from 0.
        structure: name of the attention structure.
        loss: the value that is not finite.
    """

    def __init__(self, step: int, structure: str, loss: float) -> None:
        super().__init__(f"the training loss of {structure} is {loss} at step {step}; a lower learning rate may help")
        self.step, self.structure, self.loss = step, structure, loss


class RunFolderError(TrainingError):
    """A file of the run cannot be read, written or understood."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
