"""Carry out each command."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from structattn import checks
from structattn.cli import commands
from structattn.cli.progress import Bars, hide_bars_of_transformers
from structattn.cli.task_options import OPTION_NAMES, TaskOptions, structures
from structattn.cli.writing import write_on
from structattn.comparison import files
from structattn.comparison.compare import Comparison, compare
from structattn.comparison.results import Results
from structattn.comparison.run import ModelSizes, load_run
from structattn.models import LanguageModel
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.hierarchy_text import parse_ranks
from structattn.reporting.report import write_report
from structattn.reporting.terminal import print_results, print_table
from structattn.tasks import LanguageConfig, profile_of
from structattn.tasks.tokenizers import read_tokenizer
from structattn.training import RunFolderError, TrainConfig
from structattn.training.config import BUDGETS
from structattn.training.evaluation import evaluate


def _fields(kind: type[Any], options: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a config from options of the same names.

    Args:
        kind: class of the config.
        options: the options; None is an option that was not given.
        defaults: values of fields whose option was not given.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return {name: defaults[name] for name in names if name in defaults} | given


def perform(command: commands.Action, line: Sequence[str]) -> int:
    """Perform the command and return the exit status.

    Args:
        command: the parsed command.
        line: the words of the command line, the program's name first, for the record.
    """
    hide_bars_of_transformers()
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


# --- compare and train ------------------------------------------------------------------------------------------------


def _compare(options: TaskOptions, line: Sequence[str]) -> int:
    comparison = _comparison(options)
    console = Console()
    with Bars(console, seeds=comparison.seeds > 1) as bars:
        results = compare(
            comparison, options.out, overwrite=options.overwrite, make_progress=bars.add_run, command=line
        )
    write_report(results, options.out)
    print_results(results, console)
    console.print(f"report: {options.out / 'report.html'}", highlight=False, soft_wrap=True)
    for run in results.failed:
        sys.stderr.write(f"structattn: {run.error}\n")
    return 1 if results.failed else 0


def _comparison(options: TaskOptions) -> Comparison:
    """Return the comparison of the options, completed by the preset."""
    command = options.command
    defaults = command.presets[checks.one_of("preset", options.preset, command.presets)]
    config = options.profile.config
    task = config(**command.complete(_fields(config, options, defaults)))
    sizes = ModelSizes(**_fields(ModelSizes, options, defaults))
    training = _training(options, defaults)
    return Comparison(structures(options), task, sizes, training, options.seeds, options.standard_kernel)


def _training(options: TaskOptions, defaults: Mapping[str, Any]) -> TrainConfig:
    """Return the training of the options; a budget replaces the preset's."""
    given = [name for name in BUDGETS if getattr(options, name) is not None]
    if len(given) > 1:
        words = [f"--{OPTION_NAMES.get(name, name)}" for name in given]
        raise ValueError(f"give one budget at most, got {' and '.join(words)}")
    if given:
        defaults = {name: value for name, value in defaults.items() if name not in BUDGETS}
    fixed: dict[str, Any] = {"trackers": tuple(name for name in ("tensorboard", "wandb") if getattr(options, name))}
    if options.tokens is not None:
        fixed["tokens"] = int(options.tokens)
    if options.mup is not None:
        fixed["mup"] = options.mup == "on"
    return TrainConfig(**(_fields(TrainConfig, options, defaults) | fixed))


# --- trained models ---------------------------------------------------------------------------------------------------


def _run_folder(folder: Path) -> Path:
    """Return the folder of a run, or of a comparison's best run."""
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
        if not hasattr(config.task, "data"):
            raise ValueError("--data is for models of texts and series; this run is of another task")
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=command.data))
    task, training = config.build_task(1), config.train
    task = task.test() or task
    metrics = evaluate(model, task, training.batch_size, precision=training.precision)
    console = Console(highlight=False)
    console.print(f"{config.attention}, {profile_of(config.task).name}, seed {config.seed}")
    if isinstance(config.task, LanguageConfig):
        console.print(task.data_summary, markup=False)
    for name, value in metrics.items():
        if isinstance(value, float):
            console.print(f"  {value:.4f} {task.units[name]}")
    return 0


def _generate(command: commands.Generate) -> int:
    config, model = load_run(_run_folder(command.run))
    if not isinstance(model, LanguageModel) or not isinstance(config.task, LanguageConfig):
        raise ValueError("generate is for language models; this run is of another task")
    tokenizer = read_tokenizer(config.task.tokenizer)
    for piece in write_on(model, tokenizer, command.prompt, command.length, command.temperature, command.seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


_BLOCK_RANKS = ("16,8,4,4", "8x4", "4,4,8,16")
_WINDOW_OPTIONS = (
    "value_ranks",
    "also",
    "tune_weights",
    "evaluation_length",
    "repeats",
    "rivals",
    "bits",
    "sinks",
    "seed",
)
"""Options of `retrofit` that go with `--windows`."""


def _retrofit(command: commands.Retrofit, line: Sequence[str]) -> int:
    if command.windows is not None or command.cache is not None:
        return _retrofit_by_window(command, line)
    from structattn.retrofit.measure import Retrofit, measure_retrofit
    from structattn.retrofit.report import draw_retrofit, retrofit_table, retrofit_verdict

    for name in _WINDOW_OPTIONS:
        if getattr(command, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --windows or --cache, and neither was given")
    ranks = tuple(parse_ranks(text) for text in command.ranks or _BLOCK_RANKS)
    study = Retrofit(**(_fields(Retrofit, command, {}) | {"model": _run_folder(Path(command.model)), "ranks": ranks}))
    console = Console(highlight=False)
    with Bars(console, seeds=False) as bars:
        results = measure_retrofit(
            study, command.out, overwrite=command.overwrite, make_progress=bars.add, command=line
        )
    print_table(retrofit_table(results), console)
    console.print(retrofit_verdict(results), markup=False)
    draw_retrofit([results], command.out)
    console.print(f"figure: {command.out / 'retrofit.png'}", soft_wrap=True)
    return 0


def _retrofit_by_window(command: commands.Retrofit, line: Sequence[str]) -> int:
    checks.require("transformers", "hf")
    from structattn.retrofit.cache_report import cache_table, cache_verdict, draw_cache, layer_table
    from structattn.retrofit.cache_study import CacheStudy, measure_cache

    if command.pairs is not None:
        raise ValueError("--pairs goes with levels by block: leave out --windows")
    for name in ("bits", "sinks"):
        if command.rivals == "off" and getattr(command, name) is not None:
            raise ValueError(f"--{name} says which rivals to measure: leave out --rivals off")
    fields = _fields(CacheStudy, command, {}) | {"levels": _levels(command), "cache": _share(command.cache)}
    study = CacheStudy(**fields | {"rivals": command.rivals != "off"})
    console = Console(highlight=False)
    with Bars(console, seeds=False) as bars:
        results = measure_cache(study, command.out, overwrite=command.overwrite, make_progress=bars.add, command=line)
    print_table(cache_table(results), console)
    if study.cache is not None:
        print_table(layer_table(files.read_json(command.out / "layers.json")), console)
    console.print(cache_verdict(results), markup=False)
    draw_cache(results, command.out)
    console.print(f"models: {command.out / 'models'}", soft_wrap=True)
    console.print(f"figure: {command.out / 'retrofit.png'}", soft_wrap=True)
    return 0


def _share(text: str | None) -> float | None:
    """Return a share such as 30% as a number."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--cache must be a share such as 30%, got {text!r}") from None


def _levels(command: commands.Retrofit) -> tuple[str, ...]:
    """Return hierarchies as text; values have the keys' ranks by default."""
    if command.windows is None:
        if command.ranks or command.value_ranks:
            raise ValueError(
                "--ranks needs --windows where there is --cache, such as --ranks 8,24,32 --windows 512,128"
            )
        return ()
    if not command.ranks:
        raise ValueError("--windows needs --ranks, such as --ranks 8,24,32 --windows 512,128 for heads of width 64")
    values = command.value_ranks or command.ranks
    if len(values) != len(command.ranks):
        raise ValueError(f"--value-ranks must be one for each of {len(command.ranks)} --ranks, got {len(values)}")
    sizes = parse_ranks(command.windows)
    return tuple(
        str(Hierarchy(parse_ranks(ranks), windows=(None, *sizes), value_ranks=parse_ranks(of_values)))
        for ranks, of_values in zip(command.ranks, values, strict=True)
    )


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
