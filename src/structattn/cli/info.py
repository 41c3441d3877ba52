"""Print what `structattn info` reports.

It works beside any version of other libraries, to say which ones do not fit.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from structattn import versions
from structattn.comparison.environment import environment

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
    console.print(_presets_table())
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


def _presets_table() -> Table:
    from structattn.training import FORECAST_PRESETS, PRESETS

    table = Table("preset", "layers", "width", "heads", "context", "batch", "learning rate", "training FLOPs")
    for name, row in (PRESETS | {f"{name} (forecast)": row for name, row in FORECAST_PRESETS.items()}).items():
        cells = (row.layers, row.dim, row.heads, row.context_length, row.batch_size)
        table.add_row(name, *map(str, cells), f"{row.learning_rate:g}", f"{row.flops:.2g}")
    return table
