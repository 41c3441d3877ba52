"""What can stop a run, each with a message of one line that a command can show as it is."""

from __future__ import annotations

from pathlib import Path


class TrainingError(RuntimeError):
    """A run cannot go on; whatever it had written before is intact."""


class NonFiniteLossError(TrainingError):
    """The training loss became NaN or infinite.

    Attributes:
        step: training step, counted from 0, whose loss is not finite.
        structure: name of the attention structure in training.
        loss: the value.
    """

    def __init__(self, step: int, structure: str, loss: float) -> None:
        super().__init__(f"the training loss of {structure} is {loss} at step {step}; a lower learning rate may help")
        self.step, self.structure, self.loss = step, structure, loss


class RunFolderError(TrainingError):
    """A file of the run cannot be written or read: no space, no permission, not what the run left there."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
