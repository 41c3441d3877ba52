"""What each command does, from the libraries below."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from structattn import versions
from structattn.cli import commands
from structattn.cli.progress import Bars
from structattn.cli.writing import write_on
from structattn.comparison.compare import Comparison, compare
from structattn.comparison.environment import environment
from structattn.comparison.results import Results
from structattn.comparison.run import ModelSizes, load_run, task_name
from structattn.models import LanguageModel
from structattn.ops.hierarchy import parse_ranks
from structattn.reporting.outputs import write_outputs
from structattn.reporting.terminal import print_results, print_table
from structattn.tasks import ForecastConfig, LanguageConfig, RegressionConfig, TaskConfig
from structattn.tasks.ett import default_season
from structattn.training import FORECAST_PRESETS, PRESETS, RunFolderError, TrainConfig, preset
from structattn.training.evaluation import evaluate

_Options = commands.Language | commands.Regression | commands.Forecast
_FORECAST_OPTIONS = ("horizon", "target", "time", "columns", "fill", "window_norm")
_BUDGETS = ("steps", "tokens", "flops", "minutes")

# In-context regression at a size that two cores train in under an hour.
_REGRESSION = {"layers": 4, "dim": 32, "heads": 8}
_REGRESSION_TRAINING: dict[str, Any] = {
    "steps": 20_000,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "mup": False,
    "weight_decay": 0.0,
}


def perform(command: commands.Command, line: Sequence[str]) -> int:
    """Do what the command says; the exit status.

    Args:
        command: what was typed, parsed.
        line: the words that were typed, the program's name first, for the record.
    """
    match command:
        case commands.Compare() | commands.Train():
            return _compare(command.what, line)
        case commands.Evaluate():
            return _evaluate(command)
        case commands.Generate():
            return _generate(command)
        case commands.Retrofit():
            return _retrofit(command, line)
        case commands.MupCheck():
            return _mup_check(command)
        case commands.Info():
            return _info()


# --- compare and train ------------------------------------------------------------------------------------------------


def _compare(options: _Options, line: Sequence[str]) -> int:
    comparison = _comparison(options)
    console = Console()
    with Bars(console, seeds=comparison.seeds > 1) as bars:
        results = compare(comparison, options.out, overwrite=options.overwrite, announce=bars.announce, command=line)
    write_outputs(results, options.out)
    print_results(results, console)
    console.print(f"report: {options.out / 'report.html'}", highlight=False, soft_wrap=True)
    for run in results.failed:
        sys.stderr.write(f"structattn: {run.error}\n")
    return 1 if results.failed else 0


def _comparison(options: _Options) -> Comparison:
    """What the options ask for, defaults filled in."""
    match options:
        case (
            commands.CompareLanguage(attentions=names)
            | commands.CompareRegression(attentions=names)
            | commands.CompareForecast(attentions=names)
        ):
            attentions = names
        case (
            commands.TrainLanguage(attention=name)
            | commands.TrainRegression(attention=name)
            | commands.TrainForecast(attention=name)
        ):
            attentions = (name,)
    if isinstance(options, commands.Language):
        row = preset(options.preset)
        length = row.context_length if options.context_length is None else options.context_length
        task: TaskConfig = LanguageConfig(options.data, length, max(length, row.evaluation_tokens))
        positions = options.positions or "rotary"
        sizes = {"layers": row.layers, "dim": row.dim, "heads": row.heads}
        training: dict[str, Any] = {
            "flops": row.flops, "batch_size": row.batch_size, "learning_rate": row.learning_rate
        }  # fmt: skip
    elif isinstance(options, commands.Forecast):
        row = preset(options.preset, FORECAST_PRESETS)
        task = ForecastConfig(
            data=options.data,
            context_length=row.context_length if options.context is None else options.context,
            season=default_season(options.data) if options.season is None else options.season,
            **{name: getattr(options, name) for name in _FORECAST_OPTIONS},
        )
        positions = options.positions or "learned"
        sizes = {"layers": row.layers, "dim": row.dim, "heads": row.heads}
        training = {"flops": row.flops, "batch_size": row.batch_size, "learning_rate": row.learning_rate}
    else:
        task = RegressionConfig(options.input_dim, options.curriculum)
        positions = options.positions or "learned"
        sizes, training = dict(_REGRESSION), dict(_REGRESSION_TRAINING)
    sizes |= {name: value for name in sizes if (value := getattr(options, name)) is not None}
    return Comparison(
        attentions, task, ModelSizes(**sizes, positions=positions), _training(options, training), options.seeds
    )


def _training(options: commands.Training, defaults: dict[str, Any]) -> TrainConfig:
    """The preset's training with what the options change; a budget replaces the preset's, of whatever kind."""
    given = [name for name in _BUDGETS if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"give one budget at most, got {' and '.join(f'--{name}' for name in given)}")
    if given:
        defaults = {name: value for name, value in defaults.items() if name not in _BUDGETS}
    for name in (*_BUDGETS, "batch_size", "learning_rate", "schedule"):
        if getattr(options, name) is not None:
            defaults[name] = getattr(options, name)
    if "tokens" in defaults:
        defaults["tokens"] = int(defaults["tokens"])
    if options.mup is not None:
        defaults["mup"] = options.mup == "on"
    trackers: list[Literal["tensorboard", "wandb"]] = []
    if options.tensorboard:
        trackers.append("tensorboard")
    if options.wandb:
        trackers.append("wandb")
    return TrainConfig(**defaults, precision=options.precision, compile=options.compile, trackers=tuple(trackers))


# --- trained models ---------------------------------------------------------------------------------------------------


def _run_folder(folder: Path) -> Path:
    """A run's own folder: the best of a comparison's."""
    if not folder.is_dir():
        raise RunFolderError(folder, "there is no such folder")
    if (folder / "results.json").exists():
        best = Results.load(folder).best_run
        if best is None:
            raise RunFolderError(folder, "no run of this comparison is finished")
        return folder / best.folder
    return folder


def _evaluate(command: commands.Evaluate) -> int:
    config, model = load_run(_run_folder(command.run))
    if command.data is not None:
        if isinstance(config.task, RegressionConfig):
            raise ValueError("--data is for models of texts and series; this run is of another task")
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=command.data))
    task, training = config.build_task(1), config.train
    task = task.test() or task
    metrics = evaluate(model, task, training.batch_size, precision=training.precision)
    console = Console(highlight=False)
    console.print(f"{config.attention}, {task_name(config.task)}, seed {config.seed}")
    for name, value in metrics.items():
        if isinstance(value, float):
            console.print(f"  {value:.4f} {task.units[name]}")
    return 0


def _generate(command: commands.Generate) -> int:
    _, model = load_run(_run_folder(command.run))
    if not isinstance(model, LanguageModel):
        raise ValueError("generate is for language models; this run is of another task")
    for piece in write_on(model, command.prompt, command.length, command.temperature, command.seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _retrofit(command: commands.Retrofit, line: Sequence[str]) -> int:
    from structattn.retrofit.measure import Retrofit, measure_retrofit
    from structattn.retrofit.report import draw_retrofit, retrofit_table, retrofit_verdict

    study = Retrofit(
        _run_folder(command.model),
        command.data,
        tuple(parse_ranks(text) for text in command.ranks),
        pairs=command.pairs,
        tune_steps=command.tune_steps,
        tune_rate=command.tune_rate,
        batch_size=command.batch_size,
        context_length=command.context_length,
    )
    console = Console(highlight=False)
    with Bars(console, seeds=False) as bars:
        results = measure_retrofit(study, command.out, overwrite=command.overwrite, announce=bars.add, command=line)
    print_table(retrofit_table(results), console)
    console.print(retrofit_verdict(results), markup=False)
    draw_retrofit([results], command.out)
    console.print(f"figure: {command.out / 'retrofit.png'}", soft_wrap=True)
    return 0


def _mup_check(command: commands.MupCheck) -> int:
    from structattn.training.coordinates import check_coordinates

    if command.plot is not None and not command.plot.parent.is_dir():
        raise RunFolderError(command.plot, "its folder does not exist")
    check = check_coordinates(command.attention, widths=command.widths, steps=command.steps, mup=command.mup == "on")
    console = Console(highlight=False)
    console.print(check.verdict, markup=False)
    for name in check.failures:
        console.print(f"  {name}: width^{check.slopes[name]:+.2f}")
    if command.plot is not None:
        check.plot().savefig(command.plot, dpi=150)
        console.print(f"figure: {command.plot}", soft_wrap=True)
    return 0 if check.passed else 1


def _versions_table(packages: dict[str, str | None]) -> Table:
    """Show installed versions beside those that were tested, and mark what lies outside."""
    table = Table("package", "installed", "tested", "")
    for name, version in packages.items():
        oldest, newest = versions.tested().get(name, ("", ""))
        standing = versions.standing(name, version) if oldest else ""
        mark = {"older": "older than tested: update it", "newer": "newer than tested"}.get(standing, "")
        table.add_row(name, version or "not installed", f"{oldest} to {newest}" if oldest else "", mark)
    return table


def _info() -> int:
    from structattn.ops import backends

    console = Console(highlight=False)
    facts = environment()
    console.print(f"structattn {facts['structattn']}, Python {facts['python']}")
    console.print(f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}")
    console.print(f"accelerator: {facts['accelerator'] or 'none'}\n")
    console.print(_versions_table(facts["packages"]))
    console.print("\nbackends of the attention op, best first:")
    for status in backends():
        console.print(f"  {status}", markup=False)
    table = Table("preset", "layers", "width", "heads", "context", "batch", "learning rate", "training FLOPs")
    for name, row in (PRESETS | {f"{name} (forecast)": row for name, row in FORECAST_PRESETS.items()}).items():
        cells = (row.layers, row.dim, row.heads, row.context_length, row.batch_size)
        table.add_row(name, *map(str, cells), f"{row.learning_rate:g}", f"{row.flops:.2g}")
    console.print()
    console.print(table)
    return 0
