"""Running the trials of a study: several at once, each in its folder, going on where they were stopped."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from structattn import checks
from structattn.studies import files
from structattn.studies.paper.study import Outcome, Trial
from structattn.studies.run import execute

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
        follow: is told how it goes.

    Returns:
        The outcomes, in the order of the trials.

    Raises:
        ImportError: submitit is missing, naming the extra that brings it.
    """
    checks.positive_int("jobs", jobs)
    runs = folder / "runs" if runs is None else runs
    for each in (folder, runs):
        files.make_folder(each)
    outcomes: dict[int, Outcome] = {}

    def ended(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        write_table([outcomes[each] for each in sorted(outcomes)], folder / "results.csv")
        if follow is not None:
            follow(outcome, len(outcomes), len(trials))

    if jobs == 1 and launcher == "local":
        for index, trial in enumerate(trials):
            ended(index, run_trial(trial, runs))
    else:
        with _pool(launcher, jobs, folder, partition) as pool:
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


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """One tidy table: a row for each trial."""
    rows = [outcome.tidy() for outcome in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def _result(future: Future[Outcome], trial: Trial) -> Outcome:
    """What a worker brought; a worker that died (out of memory, killed) is a failed trial."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(trial.all_labels, 0, error=f"the worker died: {error}")


def _pool(launcher: Launcher, jobs: int, folder: Path, partition: str | None) -> _Processes | _Cluster:
    return _Cluster(jobs, folder, partition) if launcher == "slurm" else _Processes(jobs)


class _Processes:
    """A process for each trial, some at a time: one that dies takes no other with it."""

    def __init__(self, jobs: int) -> None:
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.waiting = ThreadPoolExecutor(jobs)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.waiting.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """The outcome of a call in a process of its own."""
        return self.waiting.submit(self._call, function, arguments)

    def _call(self, function: Callable[..., Outcome], arguments: tuple[Any, ...]) -> Outcome:
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


class _Cluster:
    """Jobs of a Slurm cluster as futures, by submitit: it only needs `sbatch`, where other engines need a service."""

    def __init__(self, jobs: int, folder: Path, partition: str | None) -> None:
        submitit = checks.require("submitit", "cluster")
        self.executor = submitit.AutoExecutor(folder=folder / "slurm")
        options: dict[str, Any] = {"slurm_array_parallelism": jobs, "timeout_min": 24 * 60, "gpus_per_node": 1}
        if partition is not None:
            options["slurm_partition"] = partition
        self.executor.update_parameters(**options)

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        job = self.executor.submit(function, *arguments)
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()

        def wait() -> None:
            try:
                future.set_result(job.result())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return future
