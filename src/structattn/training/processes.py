"""Share a run among the processes that `torchrun` started, if any."""

from __future__ import annotations

import atexit
import functools
import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.training.config import TrainConfig
from structattn.training.errors import RunFolderError

if TYPE_CHECKING:
    from accelerate import Accelerator

RandomState = dict[str, Tensor]
"""States of torch's generators in one process: `cpu`, and `cuda` on a GPU."""


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Return Accelerate's object for this process; make `folder`, where trackers write.

    Raises:
        RunFolderError: `folder` cannot be made.
    """
    from accelerate import Accelerator

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(folder, f"the folder cannot be made: {error.strerror}") from error
    # On a machine without an accelerator, processes of torchrun find one another only if `cpu` is set.
    cpu = config.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, log_with=list(config.trackers) or None, project_dir=folder)
    if accelerator.num_processes > 1:
        _destroy_group_at_exit()
    if config.trackers:
        accelerator.init_trackers("structattn")
    return accelerator


def broadcast_number(accelerator: Accelerator, number: float) -> float:
    """Return the main process's `number` in every process."""
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor(number, dtype=torch.float64, device=accelerator.device)).item())


def gather_random_states(accelerator: Accelerator) -> list[RandomState]:
    """Return the random state of every process, by rank."""
    from accelerate.utils import gather_object

    state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    gathered: list[RandomState] = gather_object([state])
    return gathered


def set_random_state(accelerator: Accelerator, states: list[RandomState]) -> None:
    """Set this process's generators to its own of the gathered states."""
    state = states[accelerator.process_index]
    torch.set_rng_state(state["cpu"])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)


@functools.cache
def _destroy_group_at_exit() -> None:
    """Destroy the process group at exit, lest its threads abort the interpreter.

    A thread of the group that asks for the interpreter's lock while it shuts down aborts the process. Models of earlier
    runs hold the group, too, and may wait in reference cycles: they are collected first.
    """

    def destroy() -> None:
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()

    atexit.register(destroy)
