"""Kill runs with SIGKILL at chosen moments and resume them: `python -m tests.training.killing FOLDER`.

Writes the exit status of every attempt to `FOLDER/statuses.json`. One process imports everything and forks a child for
every attempt, since importing takes longer than the runs.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from structattn.training import loop
from structattn.training.metrics import MetricsFile
from tests.training.tiny import run_with_dropout

run = functools.partial(run_with_dropout, steps=24)
long_run = functools.partial(run_with_dropout, steps=240)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, calls):
    """Return `function`, except that its call number `calls` kills the process."""
    left = [calls]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            die()
        return function(*args, **kwargs)

    return wrapped


class HalfWritten:
    """A file whose first large write stores half and kills the process."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        if len(content) > 1000:  # the payload, not the header
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
        self.file.write(content)


def in_a_step():
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step, 8)


def before_the_first_checkpoint():
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step, 2)


def in_the_write_of_a_checkpoint():
    open_path, opened = Path.open, []

    def half(path, *args, **kwargs):
        file = open_path(path, *args, **kwargs)
        opened.append(path.suffix == ".partial")
        return HalfWritten(file) if path.suffix == ".partial" and sum(opened) == 3 else file

    Path.open = half


def before_the_rename():
    os.replace = dying(os.replace, 3)


def before_old_checkpoints_go():
    Path.unlink = dying(Path.unlink, 1)


def in_a_line_of_metrics():
    append, calls = MetricsFile.append, []

    def half(self, row):
        calls.append(row)
        if len(calls) == 3:
            with self.path.open("a") as file:
                file.write(json.dumps(row)[:40])
            die()
        append(self, row)

    MetricsFile.append = half


def between_metrics_and_checkpoint():
    loop.save_checkpoint = dying(loop.save_checkpoint, 3)


MOMENTS = (
    in_a_step,
    before_the_first_checkpoint,
    in_the_write_of_a_checkpoint,
    before_the_rename,
    before_old_checkpoints_go,
    in_a_line_of_metrics,
    between_metrics_and_checkpoint,
)


def fork(folder, sabotage=None, run=run):
    """Run in `folder` in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if sabotage:
            sabotage()
        run(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status(child):
    """Wait for the child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_random(folder, duration, attempts=4):
    """Kill a long run repeatedly after random times, then let it finish."""
    delays, statuses = random.Random(0), []
    for _ in range(attempts):
        child = fork(folder, run=long_run)
        time.sleep(delays.uniform(0.1, 0.5) * duration)
        os.kill(child, signal.SIGKILL)
        statuses.append(status(child))
    return [*statuses, status(fork(folder, run=long_run))]


def main(folder):
    results = {"whole": [status(fork(folder / "whole"))]}
    for moment in MOMENTS:
        name = moment.__name__
        results[name] = [status(fork(folder / name, moment)), status(fork(folder / name))]
    start = time.perf_counter()
    results["long"] = [status(fork(folder / "long", run=long_run))]
    results["at_random"] = killed_at_random(folder / "at_random", time.perf_counter() - start)
    (folder / "statuses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
