"""Runs that two processes share under `torchrun`; one is stopped and resumed."""

import sys
from pathlib import Path

from structattn.tasks import RegressionTask
from tests.training.tiny import make_task, run


class Interrupting(RegressionTask):
    """Raise in every process at the batch of step 7, as if killed."""

    def batch(self, step, *args, **kwargs):
        if step == 7:
            raise InterruptedError
        return super().batch(step, *args, **kwargs)


def interrupting(total_steps):
    task = make_task(total_steps)
    return Interrupting(task.config, seed=task.seed, total_steps=total_steps)


def main(folder):
    run(folder / "plain", micro_batches=2)
    run(folder / "whole", dropout=0.2)
    try:
        run(folder / "parts", dropout=0.2, task=interrupting)
    except InterruptedError:
        run(folder / "parts", dropout=0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
