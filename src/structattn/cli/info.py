"""Print what `structattn info` reports.

It works beside any version of other libraries, to say which ones do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from structattn import versions
from structattn.comparison.environment import environment
from structattn.tasks import TASKS

_MARKS = {
    "too old": "too old: update it",
    "older": "older than tested",
    "newer": "newer than tested",
}


def show_info() -> int:
    """Print versions, machine, backends and presets; return the exit status.

    Raises:
        ImportError: a library is too old for the backends or the presets. Versions and machine are printed before.
    """
    console = Console(highlight=False)
    facts = environment()
    console.print(f"structattn {facts['structattn']}, Python {facts['python']}")
    console.print(f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}")
    console.print(f"accelerator: {facts['accelerator'] or 'none'}\n")
    console.print(_versions_table(facts["packages"]))
    _print_backends(console)
    for name, task in TASKS.items():
        if task.command is not None:
            console.print(f"presets of {name}:", _presets_table(task.command.presets), sep="\n")
    return 0


def _versions_table(packages: dict[str, str | None]) -> Table:
    """Return a table of installed and tested versions, with marks."""
    table = Table("package", "installed", "tested", "")
    for name, version in packages.items():
        oldest, newest = versions.tested().get(name, ("", ""))
        standing = versions.standing(name, version) if oldest else ""
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        table.add_row(name, version or "not installed", tested, _MARKS.get(standing, ""))
    return table


def _print_backends(console: Console) -> None:
    from structattn.ops import backends

    console.print("\nbackends of the attention op, best first:")
    for status in backends():
        console.print(f"  {status}", markup=False)
    console.print()


_BUDGETS = ("steps", "tokens", "flops", "minutes")
# Repeats those of `TrainConfig`, whose import needs a tested version of transformers.


def _presets_table(presets: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("preset", "layers", "width", "heads", "context", "batch", "rate", "budget")
    fields = ("layers", "dim", "heads", "context_length", "batch_size", "learning_rate")
    for name, row in presets.items():
        budget = ", ".join(f"{row[field]:g} {field}" for field in _BUDGETS if field in row)
        table.add_row(name, *(f"{row[field]:g}" if field in row else "" for field in fields), budget)
    return table
