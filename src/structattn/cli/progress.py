"""Show progress bars of training runs in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from structattn.comparison.run import RunConfig
from structattn.training import MetricsRow, StepReport
from structattn.training import Progress as Follower

_UNITS = 1000
# Fields that training writes before the task's metrics, of which the first is the headline.
_COUNTERS = ("step", "tokens", "flops", "seconds", "tokens_per_second", "train_loss")


def hide_bars_of_transformers() -> None:
    """Hide the progress bars that transformers shows for every file."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


class Bars:
    """Progress bars, one per run, each made when its run starts.

    Use it as a context manager.

    Args:
        console: console to draw on.
        seeds: True to show the seed of each run.
    """

    def __init__(self, console: Console, *, seeds: bool) -> None:
        self.seeds = seeds
        self.display = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )

    def __enter__(self) -> Bars:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def add_run(self, config: RunConfig, index: int, count: int) -> Follower:
        """Return a bar for run `index` of `count` of a comparison."""
        return self.add(config.attention + (f" seed {config.seed}" if self.seeds else ""), index, count)

    def add(self, name: str, index: int, count: int) -> Follower:
        """Return a bar called `name` for run `index` of `count`."""
        name = f"[{index + 1}/{count}] {name}"
        return _Bar(self.display, self.display.add_task(name.replace("[", r"\[", 1), total=_UNITS, news="starting"))


class _Bar(Follower):
    """The bar of one run."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self.display, self.task = display, task
        self.validation = ""

    def on_start(self, step: int, total_steps: int, damaged: tuple[Path, ...]) -> None:
        """Start at the step of the run, and name damaged checkpoints."""
        for path in damaged:
            self.display.console.print(f"[yellow]damaged checkpoint skipped:[/] {path}")
        self.display.update(self.task, completed=_UNITS * step // max(1, total_steps), news="")

    def on_step(self, report: StepReport) -> None:
        """Show loss and speed."""
        news = f"loss {report.loss:.3f}{self.validation}  {report.tokens_per_second:,.0f} tokens/s"
        self.display.update(self.task, completed=int(_UNITS * report.fraction), news=news)

    def on_evaluation(self, row: MetricsRow) -> None:
        """Keep the newest headline metric beside the loss."""
        metric = next(value for name, value in row.items() if name not in _COUNTERS)
        self.validation = f"  validation {metric:.3f}"

    def on_end(self, row: MetricsRow) -> None:
        """Fill the bar, even if the run was done before."""
        self.on_evaluation(row)
        news = f"done{self.validation}  {row['tokens_per_second']:,.0f} tokens/s"
        self.display.update(self.task, completed=_UNITS, news=news)
