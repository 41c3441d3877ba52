"""Run the command line `python -m paper`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from structattn.cli import shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 on success.

    Errors are reported as by the command `structattn`. If a run of a study fails, the other runs go on and the status
    is 1.
    """
    return shell.main(
        ["python", "-m", "paper"],
        "Reproduce the studies of the paper (arXiv 2509.07963): models, figures and findings.",
        list(sys.argv[1:] if arguments is None else arguments),
        extra="paper",
        commands=_commands,
        perform=_perform,
    )


def _commands() -> Any:
    from paper.commands import Command

    return Command


def _perform(command: Any, line: Sequence[str]) -> int:
    from paper import actions

    return actions.perform(command, line)
