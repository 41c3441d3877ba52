"""Parse a command line, and end its errors in one line and an exit status. Imports nothing heavy."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def parse(command: Any, program: str, description: str, arguments: Sequence[str]) -> Any:
    """Return what the arguments say, as one of the dataclasses in the union `command`.

    Args:
        command: a union of dataclasses, each annotated with its subcommand.
        program: name of the program, for its help.
        description: what the program does, for its help.
        arguments: the words after the name.

    Raises:
        SystemExit: the arguments ask for help, or cannot be read.
    """
    import tyro

    return tyro.cli(
        command,
        prog=program,
        description=description,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def run(perform: Callable[[], int], program: str, *, debug: bool) -> int:
    """Call `perform`; return its exit status, or that of its error.

    Mistakes of the user, of the data and of the disk end in one line on standard error and status 1.

    Args:
        perform: does the work, imports included.
        program: begins the line of an error.
        debug: show where an error came from.
    """
    from transformers.utils.logging import disable_progress_bar

    from structattn.training import TrainingError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()  # Hugging Face's own, for the one file of a small model
    try:
        return perform()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        return 130
    except (ValueError, TypeError, ImportError, OSError, TrainingError) as error:
        if debug:
            traceback.print_exc()
        return fail(program, error)


def fail(program: str, error: Exception) -> int:
    """Write an error in one line on standard error; return the exit status 1."""
    line = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"{program}: {line}\n")
    return 1
