"""Run calls in processes of this machine or jobs of Slurm."""

from __future__ import annotations

import abc
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from paper.study import Outcome
from structattn import checks

if TYPE_CHECKING:
    from typing import Self

Launcher = Literal["local", "slurm"]
"""Place where trials run: processes of this machine, or jobs of a Slurm cluster through submitit."""


@dataclass(frozen=True)
class WorkerConfig:
    """Number and kind of the workers.

    Raises:
        TypeError, ValueError: `jobs` is not a positive integer.
    """

    jobs: int = 1
    """Number of trials at a time. Local processes share the cores; on a cluster, so many jobs are queued at once."""

    launcher: Launcher = "local"
    """Kind of the workers."""

    partition: str | None = None
    """Partition of the cluster."""

    gpus: int = 1
    """GPUs of each job on the cluster."""

    def __post_init__(self) -> None:
        checks.positive_int("jobs", self.jobs)

    @property
    def in_this_process(self) -> bool:
        """True if trials run one by one in this process."""
        return self.jobs == 1 and self.launcher == "local"

    def start(self, folder: Path) -> Workers:
        """Start the workers; a cluster's logs go to `folder/slurm`.

        Raises:
            ImportError: submitit is missing; names the extra that installs it.
            ValueError: this machine has no Slurm.
        """
        return SlurmWorkers(self, folder) if self.launcher == "slurm" else ProcessWorkers(self.jobs)


def threads_per_job(jobs: int) -> int:
    """Return the number of cores of each process if `jobs` processes run."""
    return max(1, (os.cpu_count() or 1) // jobs)


class Workers(abc.ABC):
    """A queue of calls, some of which run at once.

    Use it as a context.
    """

    def __init__(self, jobs: int) -> None:
        self.threads = ThreadPoolExecutor(jobs)
        """Each thread waits for one call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """Queue a call; return its future outcome."""
        return self.threads.submit(self.call, function, arguments)

    @abc.abstractmethod
    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        """Run the call in a worker and wait for its outcome."""


class ProcessWorkers(Workers):
    """A process for each call; if one dies, the others go on."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs)
        self.torch_threads = threads_per_job(jobs)

    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        """Run the call in a process of its own."""
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, self.torch_threads, function, arguments))
        process.start()
        sender.close()
        try:
            outcome: Outcome = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"exit status {process.exitcode}") from None
        process.join()
        return outcome


def _work(sender: Any, threads: int, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    sender.send(function(*arguments))


class SlurmWorkers(Workers):
    """A job of a Slurm cluster for each call.

    Submitit needs nothing but the command `sbatch`; other launchers need a service.
    """

    engine = "slurm"

    def __init__(self, config: WorkerConfig, folder: Path) -> None:
        super().__init__(config.jobs)
        submitit = checks.require("submitit", "paper")
        if self.engine == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("launcher 'slurm' needs the command sbatch, which is not on this machine")
        self.executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=self.engine)
        self.executor.update_parameters(timeout_min=24 * 60, gpus_per_node=config.gpus)
        if config.partition is not None:
            self.executor.update_parameters(slurm_partition=config.partition)

    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        """Run the call in a job of its own."""
        outcome: Outcome = self.executor.submit(function, *arguments).result()
        return outcome
