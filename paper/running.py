"""Run the trials of a study; resume stopped ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path

from filelock import FileLock

from paper.study import UNFINISHED, Outcome, Trial
from paper.tables import write_csv
from paper.workers import WorkerConfig
from structattn.comparison import files
from structattn.comparison.run import execute
from structattn.training import MetricsFile

OnOutcome = Callable[[Outcome, int, int], None]
"""Called after each trial with its outcome, the number of trials that ended, and the number of all trials."""


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    runs: Path | None = None,
    workers: WorkerConfig | None = None,
    on_outcome: OnOutcome | None = None,
) -> list[Outcome]:
    """Run the trials that have not ended; write `results.csv` after each.

    A failed trial becomes an outcome with an error, and the others go on. A stopped trial resumes from its last
    checkpoint. A finished one is read.

    Args:
        trials: the trials to run.
        folder: folder of the study.
        runs: folder of the runs, by default `folder/runs`. Studies that share it read each other's runs.
        workers: kind and number of the workers; by default trials run one by one in this process.
        on_outcome: called after each trial.

    Returns:
        The outcomes, in the order of the trials.

    Raises:
        ImportError: submitit is missing; names the extra that installs it.
        ValueError: the launcher is Slurm, and this machine has none.
    """
    workers = WorkerConfig() if workers is None else workers
    runs = folder / "runs" if runs is None else runs
    for each in (folder, runs):
        files.make_folder(each)
    outcomes: dict[int, Outcome] = {}

    def record(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        write_csv(folder / "results.csv", [outcomes[each].table_row() for each in sorted(outcomes)])
        if on_outcome is not None:
            on_outcome(outcome, len(outcomes), len(trials))

    if workers.in_this_process:
        for index, trial in enumerate(trials):
            record(index, run_trial(trial, runs))
    else:
        with workers.start(folder) as pool:
            futures = {pool.submit(run_trial, trial, runs): index for index, trial in enumerate(trials)}
            for future in as_completed(futures):
                index = futures[future]
                record(index, _outcome(future, trials[index]))
    return [outcomes[index] for index in range(len(trials))]


def run_trial(trial: Trial, runs: Path) -> Outcome:
    """Run one trial in its folder, in this process.

    An error becomes an outcome.

    A second process with the same trial waits for the first and reads its result.
    """
    parameters = 0
    try:
        parameters = trial.config.build_model().num_parameters()
        with FileLock(runs / f"{trial.folder}.lock"):
            result = execute(trial.config, runs / trial.folder)
    except Exception as error:  # one failed trial, whatever the error, must not end the study
        reason = " ".join(str(error).split()) or type(error).__name__
        return Outcome(trial.all_labels, parameters, error=f"{type(error).__name__}: {reason}")
    if isinstance(result, str):
        return Outcome(trial.all_labels, parameters, error=result)
    return Outcome(trial.all_labels, parameters, tuple(dict(row) for row in result.metrics))


def has_ended(trial: Trial, runs: Path) -> bool:
    """True if the folder of the trial holds its result or its failure."""
    folder = runs / trial.folder
    return (folder / "model" / "config.json").exists() or (folder / "failed.txt").exists()


def unfinished(trial: Trial, runs: Path) -> Outcome | None:
    """Return the evaluations of a run that has not ended, labelled so; None if it has, or has none."""
    rows = MetricsFile(runs / trial.folder / "metrics.jsonl").rows() if not has_ended(trial, runs) else []
    if not rows:
        return None
    labels = trial.all_labels | UNFINISHED
    return Outcome(labels, trial.config.build_model().num_parameters(), tuple(dict(row) for row in rows))


def _outcome(future: Future[Outcome], trial: Trial) -> Outcome:
    """Return the worker's outcome.

    A worker that died (out of memory, killed) is a failed trial.
    """
    try:
        return future.result()
    except Exception as error:
        return Outcome(trial.all_labels, 0, error=f"the worker died: {' '.join(str(error).split())}")
