"""Progress bar of a study in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from paper.study import Outcome


class TrialBar:
    """Progress bar over the trials of a study.

    Prints a line for each trial that ended. Use it as a context.

    Args:
        console: console to draw on.
        count: number of trials.
    """

    def __init__(self, console: Console, count: int) -> None:
        self.display = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self.task = self.display.add_task("runs", total=count)

    def __enter__(self) -> TrialBar:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def on_outcome(self, outcome: Outcome, ended: int, count: int) -> None:
        """Print the outcome and advance the bar."""
        result = f"[red]{escape(outcome.error)}[/]" if outcome.error else f"{outcome.loss:.4f}"
        self.display.console.print(f"{escape(outcome.name)}: {result}", highlight=False)
        self.display.update(self.task, completed=ended)
