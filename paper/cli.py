"""Run the command line `python -m paper`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from structattn import checks
from structattn.cli import shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 on success.

    Errors are reported as by the command `structattn`. A study with failed runs ends with status 1, after its other
    runs are done.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        checks.require("tyro", "paper")
    except ImportError as error:
        return shell.fail("paper", error)
    from paper.commands import Command

    command = shell.parse(
        Command,
        "python -m paper",
        "Reproduce the studies of the paper (arXiv 2509.07963): models, figures and findings.",
        arguments,
    )

    def perform() -> int:
        from paper import actions

        return actions.perform(command, ["python", "-m", "paper", *arguments])

    return shell.run(perform, "paper", debug=command.debug)
