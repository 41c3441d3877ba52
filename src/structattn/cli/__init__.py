"""The command `structattn`: what a user types, and one line where it cannot be done."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from structattn import checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 0 where all went well.

    Mistakes of the user, of the data and of the disk end in one line on standard error and status 1; `--debug` shows
    where they came from. A run whose loss is NaN does so after the other runs are done.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from structattn import __version__

        sys.stdout.write(f"structattn {__version__}\n")
        return 0
    tyro = checks.require("tyro", "train")
    from structattn.cli.commands import Command

    command = tyro.cli(
        Command,
        prog="structattn",
        description="Choose the structure of softmax attention: compare, train and use models (arXiv 2509.07963).",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    from structattn.cli import actions

    return actions.perform(command, arguments)
