"""Parse a command line; report errors in one line and a status."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

from structattn import checks


def main(
    program: Sequence[str],
    description: str,
    arguments: Sequence[str],
    *,
    extra: str,
    commands: Callable[[], Any],
    perform: Callable[[Any, Sequence[str]], int],
) -> int:
    """Run a command line; return its exit status, 0 on success.

    Args:
        program: the words that call it; the last one starts every error line.
        description: purpose of the program, for its help.
        arguments: the words after these.
        extra: the extra of the package that installs tyro.
        commands: imports the union of subcommands, see `parse`.
        perform: performs the parsed command; also gets the whole line. Imports what it needs, see `run`.
    """
    name = program[-1]
    try:
        checks.require("tyro", extra)
    except ImportError as error:
        return fail(name, error)
    command = parse(commands(), " ".join(program), description, arguments)
    debug = getattr(command, "what", command).debug  # `what` holds the subcommand of a subcommand
    return run(lambda: perform(command, [*program, *arguments]), name, debug=debug)


def parse(command: Any, program: str, description: str, arguments: Sequence[str]) -> Any:
    """Parse the arguments into one of the dataclasses in the union `command`.

    Args:
        command: a union of dataclasses, each annotated with its subcommand.
        program: name of the program, for its help.
        description: purpose of the program, for its help.
        arguments: the words after the name.

    Raises:
        SystemExit: the arguments ask for help, or cannot be parsed. A misspelt command is answered in three lines.
    """
    import tyro

    _check_words(command, program, arguments)
    return tyro.cli(
        command,
        prog=program,
        description=description,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _check_words(command: Any, program: str, words: Sequence[str]) -> None:
    """Exit with status 2 if a word is no subcommand.

    tyro would list every option of the nearest ones.
    """
    known = _subcommands(command)
    if not known or not words or words[0].startswith("-"):
        return
    if words[0] not in known:
        hint = checks.did_you_mean(words[0], known)
        sys.stderr.write(
            f"{program}: no command {words[0]!r}{hint}\nknown are {', '.join(known)}\nsee {program} --help\n"
        )
        raise SystemExit(2)
    for field in get_type_hints(known[words[0]], include_extras=True).values():
        _check_words(field, f"{program} {words[0]}", words[1:])


def _subcommands(command: Any) -> dict[str, type]:
    """Return the dataclasses of a union by their subcommands."""
    named = {}
    for option in get_args(command):
        for note in getattr(option, "__metadata__", ()):
            if isinstance(getattr(note, "name", None), str):
                named[note.name] = get_args(option)[0]
    return named


def run(perform: Callable[[], int], program: str, *, debug: bool) -> int:
    """Call `perform` and return its exit status, or that of its error.

    Errors of the user, the data or the disk end in one line on standard error and status 1.

    Args:
        perform: the work, including its imports.
        program: name of the program, at the start of an error line.
        debug: also print the traceback of an error.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return perform()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command resumes from the last checkpoint\n")
        return 130
    except Exception as error:
        if not _is_reported(error):
            raise
        if debug:
            traceback.print_exc()
        return fail(program, error)


def _is_reported(error: Exception) -> bool:
    """Return True for errors of user, data, disk and runs.

    Other errors are faults of the program.
    """
    runs = sys.modules.get("structattn.training.errors")  # not imported: there was no run
    return isinstance(error, (ValueError, TypeError, ImportError, OSError)) or (
        runs is not None and isinstance(error, runs.TrainingError)
    )


def fail(program: str, error: Exception) -> int:
    """Write an error in one line on standard error; return status 1."""
    line = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"{program}: {line}\n")
    return 1
