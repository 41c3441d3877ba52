"""Run the command `structattn`."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from structattn.cli import shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, 0 on success.

    Errors of the user, the data or the disk end in one line on standard error and status 1; `--debug` adds the
    traceback. A run whose loss is NaN ends so after the other runs are done.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from structattn import __version__

        sys.stdout.write(f"structattn {__version__}\n")
        return 0
    if arguments[:1] in (["study"], ["chronos"]):
        return _point_to_paper(arguments)
    if arguments[:1] in (["compare"], ["train"]):
        arguments = _rename_budget(arguments)
    return shell.main(
        ["structattn"],
        "Choose the structure of softmax attention: compare, train and use models (arXiv 2509.07963).",
        arguments,
        extra="train",
        commands=_commands,
        perform=_perform,
    )


def _commands() -> Any:
    from structattn.cli.commands import commands

    return commands()


def _perform(command: Any, line: Sequence[str]) -> int:
    from structattn.cli.commands import Info

    if isinstance(command, Info):  # works beside versions that the actions cannot import
        from structattn.cli.info import show_info

        return show_info()
    from structattn.cli import actions

    return actions.perform(command, line)


def _rename_budget(arguments: Sequence[str]) -> list[str]:
    """Rename a budget `--tokens` to `--train-tokens`, and tell standard error."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--tokens=") else [word])]
    for place, (word, value) in enumerate(itertools.pairwise(words)):
        if word == "--tokens" and _is_number(value):
            words[place] = "--train-tokens"
            sys.stderr.write(
                f"structattn: a budget of tokens is now --train-tokens {value}; --tokens names a tokenizer\n"
            )
    return words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _point_to_paper(arguments: Sequence[str]) -> int:
    """Name the command that replaces a former one; return status 1."""
    name, *rest = arguments
    words = rest if name == "study" else arguments
    command = shlex.join(["python", "-m", "paper", *words])
    sys.stderr.write(f"structattn: {name} is no longer a subcommand; in a checkout, run `{command}`\n")
    return 1
