"""Part 4: compare attention in a language model that a CPU is too slow for, at equal steps, on the card.

A short run of each structure times its step. The slowest then has about 100 seconds, and all do as many steps as it.
The trainer is that of `structattn compare language`; a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.attention import DEFAULT, Case, compile_ahead
from benchmarks.gpu.correctness import CHOICES
from benchmarks.gpu.setup import Setup, kernels_serve
from benchmarks.gpu.workers import Job, Stage
from benchmarks.output import Row
from structattn.comparison.run import ModelSizes, RunConfig, execute, run_name
from structattn.tasks.profiles.language import LanguageConfig
from structattn.training import Progress, TrainConfig
from structattn.training.metrics import MetricsRow
from structattn.training.progress import StepReport

SECONDS = 600.0
"""Time of the part on a card."""
SECONDS_EACH = 100.0
"""Time of the slowest run, which sets the steps of all."""
STRUCTURES = ("standard", "swa:384", "mlr")
"""A window of 384 has as much attention work as `mlr` at this context."""
CONTEXT, BATCH, LEARNING_RATE = 2048, 16, 2e-3
SIZES = ModelSizes(layers=6, dim=512, heads=8, positions="rotary")
TINY_SIZES, TINY_CONTEXT = ModelSizes(layers=1, dim=32, heads=1, positions="rotary"), 32
TRIAL_STEPS = 40
_REPORT_SECONDS = 3.0


def stages(setup: Setup, document: Row) -> Iterator[Stage]:
    """Yield compilation ahead, short runs that time a step, and the runs."""
    if setup.data is None:
        raise SystemExit("the part language needs --data: a folder of .txt files")
    if not setup.rehearse:
        case = Case("forward + backward", CONTEXT, 64, (DEFAULT,))
        ahead = [Job(f"compile, choice {at}", compile_ahead, (case, DEFAULT, at), limit=200.0) for at in range(CHOICES)]
        yield Stage(ahead, setup.processes)
    yield Stage([Job(f"{name}, step", time_step, (name,), limit=240.0) for name in STRUCTURES])
    slowest = max((row["seconds_per_step"] for row in document["rows"] if "seconds_per_step" in row), default=None)
    if slowest is not None:
        steps = 12 if setup.rehearse else max(10, int(SECONDS_EACH / slowest))
        limit = 3 * SECONDS_EACH
        yield Stage([Job(name, train, (name, steps), {"steps": steps}, limit) for name in STRUCTURES])


def config(setup: Setup, structure: str, steps: int) -> RunConfig:
    """Return every setting of a run."""
    context = TINY_CONTEXT if setup.rehearse else CONTEXT
    task = LanguageConfig(
        str(setup.data), context, evaluation_tokens=2 * context if setup.rehearse else 131_072, tokenizer="bytes"
    )
    precision: Any = "float32" if setup.rehearse else "bfloat16"
    batch = 1 if setup.rehearse else BATCH
    training = TrainConfig(steps=steps, batch_size=batch, learning_rate=LEARNING_RATE, precision=precision)
    return RunConfig(structure, task, TINY_SIZES if setup.rehearse else SIZES, training)


def time_step(setup: Setup, structure: str) -> Iterator[Row]:
    """Yield the seconds of a step, after the first ones, which tune."""
    clock = _Clock()
    steps = 20 if setup.rehearse else TRIAL_STEPS
    with kernels_serve(setup), tempfile.TemporaryDirectory() as folder:
        execute(config(setup, structure, steps), Path(folder) / "run", clock)
    (first, begun), (last, ended) = clock.seen[0], clock.seen[-1]
    seconds = (ended - begun) / (last - first)
    yield {"kind": "step", "seconds_per_step": seconds, "shown": {"step": f"{1e3 * seconds:.1f} ms"}}


class _Clock(Progress):
    """Times at which reports came.

    Losses have been read by then, so the card has finished the step.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append((report.step, time.perf_counter()))


def train(setup: Setup, structure: str, steps: int) -> Iterator[Row]:
    """Train a model and yield its losses as they come."""
    chosen = config(setup, structure, steps)
    folder = setup.scratch / "language" / f"{steps}-steps" / run_name(chosen)

    def run(emit: Callable[[Row], None]) -> None:
        with kernels_serve(setup):
            outcome = execute(chosen, folder, _Losses(emit))
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        emit({"kind": "final", **_evaluated(outcome.metrics[-1])})

    yield from as_they_come(run)


class _Losses(Progress):
    """Hands on the training loss every few seconds, and every evaluation."""

    def __init__(self, emit: Callable[[Row], None]) -> None:
        self.emit = emit
        self.last = 0.0

    def on_step(self, report: StepReport) -> None:
        if time.monotonic() - self.last > _REPORT_SECONDS:
            self.last = time.monotonic()
            shown = {"step": report.step, "loss": f"{report.loss:.3f}"}
            self.emit({"kind": "training", "step": report.step, "train_loss": report.loss, "shown": shown})

    def on_evaluation(self, row: MetricsRow) -> None:
        self.emit({"kind": "evaluation", **_evaluated(row)})


def _evaluated(row: MetricsRow) -> Row:
    shown = {"step": row["step"], "nats per byte": f"{row['nats_per_byte']:.3f}"}
    return {**row, "shown": shown}


def as_they_come(run: Callable[[Callable[[Row], None]], None]) -> Iterator[Row]:
    """Yield the rows that a threaded function emits; raise its errors."""
    rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
    failures: list[Exception] = []

    def work() -> None:
        try:
            run(rows.put)
        except Exception as failure:
            failures.append(failure)
        rows.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from iter(rows.get, None)
    thread.join()
    if failures:
        raise failures[0]


def conclude(document: Row) -> None:
    """Name the runs that failed."""
    document["failed"] = [row["case"] for row in document["rows"] if "reason" in row]
