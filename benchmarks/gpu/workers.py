"""Run jobs in child processes, so that none can end the others.

A fault on the card ends the CUDA context of its process: every later call there fails. A kernel may never return, too.
Here such a job is reported and the next one gets a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks import machine
from benchmarks.gpu.setup import Setup
from benchmarks.output import Row


@dataclass(frozen=True)
class Job:
    """A named function whose rows go to the JSON."""

    name: str
    run: Callable[..., Iterator[Row]]
    """Takes the setup and the arguments; a function of a module, so that a process can be told of it."""
    arguments: tuple[Any, ...] = ()
    about: Row = field(default_factory=dict)
    """Inputs of the job, for its rows."""
    limit: float = 120.0
    """Seconds after which it is ended."""


@dataclass(frozen=True)
class Stage:
    """Jobs that run one after the other, or several at a time."""

    jobs: list[Job]
    processes: int = 1
    share: float = 1.0
    """Share of the part's time after which no job of the stage is begun."""


Handle = Callable[[Job, Row], None]
"""Takes each row of a job as it comes."""


def run(jobs: Iterable[Job], handle: Handle, setup: Setup, *, processes: int, seconds: float) -> list[Job]:
    """Run jobs, several at a time; return those not begun in time.

    A job that fails gives a row with the `reason`. No job is begun after `seconds`.
    """
    waiting, deadline = deque(jobs), time.monotonic() + seconds
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while busy or (waiting and time.monotonic() < deadline):
            while waiting and len(busy) < processes and time.monotonic() < deadline:
                worker = idle.pop() if idle else _Worker(setup)
                worker.begin(waiting.popleft())
                busy.append(worker)
            wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in list(busy):
                if worker.serve(handle):
                    busy.remove(worker)
                    if worker.is_alive:
                        idle.append(worker)
    finally:
        for worker in (*idle, *busy):
            worker.end()
    return list(waiting)


def run_here(jobs: Iterable[Job], handle: Handle, setup: Setup) -> None:
    """Run the jobs in this process, as a child would; for tests."""
    for job in jobs:
        for row in _rows(job, setup):
            handle(job, row)


class _Worker:
    """A child process and the job that it has."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.is_alive = True
        self.job = Job("none", _nothing)
        self.begun = 0.0

    def begin(self, job: Job) -> None:
        self.job, self.begun = job, time.monotonic()
        self.pipe.send(job)

    def serve(self, handle: Handle) -> bool:
        """Hand on the rows that came; return True if the job ended."""
        try:
            while self.pipe.poll():
                row, self.is_alive = self.pipe.recv()
                if row is None:
                    return True
                handle(self.job, row)
        except (EOFError, OSError):
            self.process.join(5)
            self._fail(handle, f"the process ended by itself, exit code {self.process.exitcode}")
            return True
        if time.monotonic() - self.begun > self.job.limit:
            self._fail(handle, f"not done after {self.job.limit:.0f} s")
            return True
        return False

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()

    def _fail(self, handle: Handle, reason: str) -> None:
        handle(self.job, {"reason": reason})
        self.is_alive = False
        self.end()


def _serve(pipe: Connection, setup: Setup) -> None:
    """Run jobs until the other end closes or the card is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    setup.prepare()
    usable = True
    while usable:
        try:
            job = pipe.recv()
        except EOFError:
            return
        for row in _rows(job, setup):
            pipe.send((row, True))
        usable = _is_usable(setup)
        pipe.send((None, usable))
    pipe.close()
    os._exit(0)  # destructors of a lost context may hang


def _rows(job: Job, setup: Setup) -> Iterator[Row]:
    """Yield the rows of a job, and why it failed."""
    try:
        yield from job.run(setup, *job.arguments)
    except Exception as failure:  # a row says what failed, and the next job goes on
        yield {"reason": machine.reason(failure), "traceback": traceback.format_exc().splitlines()[-12:]}


def _is_usable(setup: Setup) -> bool:
    """Return True if the process can still use the card.

    Free its memory for the next job.
    """
    if setup.rehearse:
        return True
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _nothing(setup: Setup) -> Iterator[Row]:
    return iter(())
