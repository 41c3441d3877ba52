"""Actions of the commands of `python -m paper`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from paper import commands
from paper.catalogue import study
from paper.chronos.data import RealSeries
from paper.chronos.figure import chronos_markdown, chronos_table, draw_chronos
from paper.chronos.run import REDUCED, ChronosRunConfig, chronos_training
from paper.chronos.study import ChronosStudy, measure_chronos
from paper.chronos.task import ChronosDataConfig
from paper.planning import plan, plan_table
from paper.progress import TrialBar
from paper.report import collect, conclude
from paper.running import has_ended, run_trials, unfinished
from paper.study import Outcome
from paper.workers import WorkerConfig
from structattn import checks
from structattn.cli.progress import Bars, hide_bars_of_transformers
from structattn.comparison import files
from structattn.reporting.terminal import print_table
from structattn.tasks.ett import default_season


def perform(command: commands.Command, line: Sequence[str]) -> int:
    """Perform the command; return the exit status.

    Args:
        command: the parsed command.
        line: the command line, program first; stored with the results.
    """
    hide_bars_of_transformers()
    match command:
        case commands.Study():
            return _study(command, line)
        case commands.Chronos():
            return _chronos(command, line)


def _study(command: commands.Study, line: Sequence[str]) -> int:
    chosen = study(command.name)
    if command.data is not None and chosen.data is None:
        raise ValueError(f"data: the study {chosen.name} draws its own, got --data {command.data}")
    data = command.data or chosen.data or ""
    workers = WorkerConfig(command.jobs, command.launcher, command.partition, command.gpus)
    trials = chosen.trials(command.preset, data, checks.positive_int("seeds", command.seeds))
    console = Console(highlight=False)
    if command.dry_run:
        print_table(plan_table(plan(trials, command.jobs), command.jobs), console)
        return 0
    for config in {type(trial.config): trial.config for trial in trials}.values():
        config.build_task(1)  # Fails before the first run if data or an extra is missing.
    folder, runs = command.out / chosen.name, command.out / "runs"
    begun: list[Outcome] = []
    if command.finished:
        if chosen.shows_unfinished:
            begun = [outcome for trial in trials if (outcome := unfinished(trial, runs)) is not None]
        trials = [trial for trial in trials if has_ended(trial, runs)]
    with TrialBar(console, len(trials)) as bar:
        outcomes = run_trials(
            trials,
            folder,
            runs=runs,
            workers=workers,
            on_outcome=bar.on_outcome,
        )
    outcomes += begun
    finding = conclude(chosen, outcomes, command.preset, folder, line)
    console.print(finding.statement, markup=False)
    console.print(f"{finding.agreement} The paper: {chosen.text.reported}", markup=False)
    console.print(f"report: {collect(command.out)}", soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        sys.stderr.write(f"paper: {outcome.name}: {outcome.error}\n")
    return 1 if failed else 0


def _chronos(command: commands.Chronos, line: Sequence[str]) -> int:
    run = ChronosRunConfig(
        size=REDUCED if command.size == "reduced" else command.size,
        context_length=command.context_length,
        prediction_length=command.horizon,
        n_tokens=command.n_tokens,
        data=ChronosDataConfig(
            command.compositions,
            length=max(ChronosDataConfig.length, command.context_length + command.horizon),
            min_past=min(ChronosDataConfig.min_past, command.context_length),
            evaluation_series=command.evaluation_series,
        ),
        train=chronos_training(
            command.steps,
            batch_size=command.batch_size,
            learning_rate=command.learning_rate,
            precision=command.precision,
        ),
    )
    series = None
    if command.series is not None:
        season = default_season(command.series) if command.season is None else command.season
        series = RealSeries(command.series, command.time, command.columns, command.fill, season)
    study = ChronosStudy(command.attentions, run, seeds=command.seeds, series=series, samples=command.samples)
    console = Console(highlight=False)
    with Bars(console, seeds=False) as bars:
        results = measure_chronos(study, command.out, overwrite=command.overwrite, announce=bars.add, command=line)
    print_table(chronos_table(results), console)
    if results.verdict:
        console.print(results.verdict, markup=False)
    for name, (judged, left_out) in results.judged.items():
        if left_out:
            console.print(
                f"{name}: {judged} series judged, {left_out} left out, whose future has missing values or whose past "
                "repeats itself exactly"
            )
    files.write_text(command.out / "table.md", chronos_markdown(results) + "\n")
    draw_chronos(results, command.out)
    console.print(f"figure: {command.out / 'loss-flops.png'}", soft_wrap=True)
    return 0
