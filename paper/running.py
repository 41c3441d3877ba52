"""Running the trials of a study: several at once, each in its folder, going on where they were stopped."""

from __future__ import annotations

import abc
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock

from paper.study import Outcome, Trial
from structattn import checks
from structattn.studies import files
from structattn.studies.run import execute

if TYPE_CHECKING:
    from typing import Self

Launcher = Literal["local", "slurm"]
Follow = Callable[[Outcome, int, int], None]
"""Told of each trial that ended, how many have, and how many there are."""


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    runs: Path | None = None,
    jobs: int = 1,
    launcher: Launcher = "local",
    partition: str | None = None,
    gpus: int = 1,
    follow: Follow | None = None,
) -> list[Outcome]:
    """Run what is left of the trials; after each one the table of those that ended is on disk.

    A trial that fails is an outcome with its error, and the others go on. One that was stopped goes on from its last
    checkpoint, and one that is done is read.

    Args:
        trials: what to run.
        folder: of the study.
        runs: of its runs, which other studies may share: what one trained, the next reads. By default `folder/runs`.
        jobs: processes at a time; each gets its share of the machine's cores. On a cluster, jobs in the queue at once.
        launcher: `local` processes, or jobs of a Slurm cluster through submitit.
        partition: of the cluster.
        gpus: that a job of the cluster gets.
        follow: is told how it goes.

    Returns:
        The outcomes, in the order of the trials.

    Raises:
        ImportError: submitit is missing, naming the extra that brings it.
        ValueError: `jobs` is not positive, or there is no Slurm here.
    """
    checks.positive_int("jobs", jobs)
    runs = folder / "runs" if runs is None else runs
    for each in (folder, runs):
        files.make_folder(each)
    outcomes: dict[int, Outcome] = {}

    def ended(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        files.write_csv(folder / "results.csv", [outcomes[each].tidy() for each in sorted(outcomes)])
        if follow is not None:
            follow(outcome, len(outcomes), len(trials))

    if jobs == 1 and launcher == "local":
        for index, trial in enumerate(trials):
            ended(index, run_trial(trial, runs))
    else:
        with _pool(launcher, jobs, folder, partition, gpus) as pool:
            futures: dict[Future[Outcome], int] = {
                pool.submit(run_trial, trial, runs): index for index, trial in enumerate(trials)
            }
            for future in as_completed(futures):
                index = futures[future]
                ended(index, _result(future, trials[index]))
    return [outcomes[index] for index in range(len(trials))]


def run_trial(trial: Trial, runs: Path) -> Outcome:
    """One trial in its folder in `runs`, in this process; what fails is in the outcome.

    A second process that comes to the same run waits for the first, and reads what it made.
    """
    parameters = 0
    try:
        parameters = trial.config.build_model().num_parameters()
        with FileLock(runs / f"{trial.folder}.lock"):
            result = execute(trial.config, runs / trial.folder)
    except Exception as error:  # a study of many trials must outlive one of them, whatever went wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        return Outcome(trial.all_labels, parameters, error=f"{type(error).__name__}: {reason}")
    if isinstance(result, str):
        return Outcome(trial.all_labels, parameters, error=result)
    return Outcome(trial.all_labels, parameters, tuple(dict(row) for row in result.metrics))


def threads_of(jobs: int) -> int:
    """What each of several processes has of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def _result(future: Future[Outcome], trial: Trial) -> Outcome:
    """What a worker brought; a worker that died (out of memory, killed) is a failed trial."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(trial.all_labels, 0, error=f"the worker died: {' '.join(str(error).split())}")


def _pool(launcher: Launcher, jobs: int, folder: Path, partition: str | None, gpus: int) -> _Waiting:
    return _Cluster(jobs, folder, partition, gpus) if launcher == "slurm" else _Processes(jobs)


class _Waiting(abc.ABC):
    """Calls that wait for their turn, so many at once."""

    def __init__(self, jobs: int) -> None:
        self.turns = ThreadPoolExecutor(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.turns.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """The outcome of a call, elsewhere."""
        return self.turns.submit(self.call, function, arguments)

    @abc.abstractmethod
    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        """Make the call elsewhere and wait for it."""


class _Processes(_Waiting):
    """A process for each trial, some at a time: one that dies takes no other with it."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs)
        self.threads = threads_of(jobs)

    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, self.threads, function, arguments))
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


class _Cluster(_Waiting):
    """Jobs of a Slurm cluster, by submitit: it only needs `sbatch`, where other engines need a service."""

    engine = "slurm"

    def __init__(self, jobs: int, folder: Path, partition: str | None, gpus: int) -> None:
        super().__init__(jobs)
        submitit = checks.require("submitit", "paper")
        if self.engine == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("launcher 'slurm' needs the command sbatch, which is not on this machine")
        self.executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=self.engine)
        self.executor.update_parameters(timeout_min=24 * 60, gpus_per_node=gpus)
        if partition is not None:
            self.executor.update_parameters(slurm_partition=partition)

    def call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
        outcome: Outcome = self.executor.submit(function, *arguments).result()
        return outcome
