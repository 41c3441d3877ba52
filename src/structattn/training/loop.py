"""Train until the budget is spent; resume from the newest checkpoint.

The data of a step are a pure function of (seed, step), so a checkpoint needs no iterator state: it holds model,
optimiser, counters, random states and the length of metrics.jsonl. A killed run that is started again by the same call
writes the same metrics, bit for bit. Exceptions: columns that measure time (`metrics.WALL_CLOCK`), and runs with a
budget of minutes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.training.budget import MakeTask, evaluation_cost, evaluation_interval, plan_steps
from structattn.training.checkpoint import State, restore_checkpoint, save_checkpoint
from structattn.training.clock import Clock
from structattn.training.config import TrainConfig
from structattn.training.errors import NonFiniteLossError
from structattn.training.evaluation import evaluate
from structattn.training.identity import check_same_run, describe_run
from structattn.training.metrics import MetricsFile, MetricsRow
from structattn.training.processes import broadcast_number, gather_random_states, make_accelerator, set_random_state
from structattn.training.progress import Progress, StepReport
from structattn.training.schedule import rate_factor
from structattn.training.update import Updater

if TYPE_CHECKING:
    from accelerate import Accelerator

    from structattn.models import StructuredModel
    from structattn.tasks import Task

_REPORT_INTERVAL = 10


@dataclass(frozen=True)
class TrainResult:
    """Counters and metrics of a finished run."""

    steps: int
    """Steps done."""

    tokens: int
    """Tokens trained on."""

    flops: int
    """Training FLOPs, forward and backward."""

    seconds: float
    """Seconds of training over all calls, without evaluations and checkpoints."""

    metrics: list[MetricsRow]
    """Every evaluation; the last one is at the end of the run."""

    damaged_checkpoints: tuple[Path, ...] = ()
    """Damaged files that this call skipped when it resumed the run."""


def train(
    model: StructuredModel,
    make_task: MakeTask,
    config: TrainConfig,
    folder: Path,
    *,
    structure: str | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `model` in place until the budget is spent.

    Resumes from the newest checkpoint in `folder`. Writes `metrics.jsonl` and `checkpoints/` into `folder`. Runs
    in one process, or in every process that `torchrun` started; these share each batch.

    Args:
        model: a fresh model. A call that resumes a run needs the same initial weights.
        make_task: makes data, loss and metrics from the run's number of steps.
        config: budget, optimiser and other settings.
        folder: holds this run alone; made if missing.
        structure: name of the model in messages; by default its attention.
        progress: callbacks, called on the main process.

    Returns:
        The counters and all evaluations.

    Raises:
        ValueError: the budget is below one step, the batch does not divide among processes and micro-batches, or
            `folder` holds a run of another config.
        NonFiniteLossError: the loss is NaN or infinite.
        RunFolderError: a file cannot be written, or a file of the run is missing.
    """
    accelerator = make_accelerator(config, folder)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            run = _Run(accelerator, model, config, folder, structure or str(model.config.attention), progress)
            run.restore_or_plan(make_task)
            return run.train_to_end()
    finally:
        # The process group stays open: the next run of this process uses it.
        for tracker in accelerator.trackers:
            tracker.finish()


@dataclass
class _Counters:
    """Numbers that grow from step to step."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0


class _Run:
    """State and steps of a run in one of its processes."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: StructuredModel,
        config: TrainConfig,
        folder: Path,
        structure: str,
        progress: Progress | None,
    ) -> None:
        self.accelerator, self.config, self.folder, self.structure = accelerator, config, folder, structure
        self.model = model.to(accelerator.device).train()
        self.updater = Updater(accelerator, self.model, config)
        self.progress = progress if progress is not None and accelerator.is_main_process else Progress()
        self.counters = _Counters()
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.losses: list[float] = []
        """Losses of the steps since the last evaluation."""
        self.pending: list[Tensor] = []
        """Losses that are still on the device."""
        self.training_flops = functools.cache(lambda length: self.model.flops(length).training)
        """FLOPs of one training sequence by its length."""
        # Set by `restore_or_plan`.
        self.total_steps: int
        self.interval: int
        """Steps between evaluations."""
        self.damaged: tuple[Path, ...]
        """Damaged checkpoints that were skipped."""
        self.task: Task
        self.clock: Clock

    def restore_or_plan(self, make_task: MakeTask) -> None:
        """Restore the newest checkpoint, or plan a new run."""
        torch.manual_seed(self.config.seed + self.accelerator.process_index)
        restored = restore_checkpoint(self.folder / "checkpoints")
        if restored.state is None:
            self.total_steps = self._plan(make_task)
        else:
            self._restore(restored.state)
        self.damaged = restored.damaged
        if self.accelerator.is_main_process:
            self.metrics.truncate(restored.state["metrics_size"] if restored.state else 0)
        self.accelerator.wait_for_everyone()
        self.task = make_task(self.total_steps)
        if self.task.evaluation_size < self.accelerator.num_processes:
            raise ValueError(f"an evaluation needs a row for each process, got {self.task.evaluation_size} rows")
        cost = evaluation_cost(self.task, self.config.batch_size, self.model)
        self.interval = evaluation_interval(self.config, self.total_steps, cost)
        self.clock = Clock(self.counters.seconds, self.counters.tokens)

    def train_to_end(self) -> TrainResult:
        """Train to the end of the budget."""
        self.progress.on_start(self.counters.step, self.total_steps, self.damaged)
        spent = self._spent()
        while spent < 1.0:
            self._step(spent)
            spent = self._spent()
            due = spent >= 1.0 or self.counters.step % self.interval == 0
            if due or self.counters.step % _REPORT_INTERVAL == 0:
                self._report(min(spent, 1.0))
            if due:
                with self.clock.stopped():
                    self._evaluate()
                    self._save()
        counters, rows = self.counters, self.metrics.rows()
        self.progress.on_end(rows[-1])
        return TrainResult(counters.step, counters.tokens, counters.flops, counters.seconds, rows, self.damaged)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, spent: float) -> None:
        """Do one optimiser step; `spent` sets the learning rate."""
        config, counters = self.config, self.counters
        if config.minutes is None:
            spent += 0.5 / self.total_steps  # The middle of the step, so that no step has rate zero.
        factor = rate_factor(spent, warmup=config.warmup, schedule=config.schedule, final=config.final_rate)
        self.pending.append(self.updater.step(self.task, counters.step, factor))
        length = self.task.sequence_length(counters.step)
        counters.step += 1
        counters.tokens += config.batch_size * length
        counters.flops += config.batch_size * self.training_flops(length)

    def _report(self, spent: float) -> None:
        """Read the pending losses and report progress; waits for the device.

        Raises:
            NonFiniteLossError: a loss is not finite.
        """
        counters = self.counters
        losses = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        self.pending.clear()
        for step, loss in enumerate(losses, start=counters.step - len(losses)):
            if not math.isfinite(loss):
                raise NonFiniteLossError(step, self.structure, loss)
        self.losses += losses
        counters.seconds = self.clock.read()
        self.progress.on_step(
            StepReport(
                step=counters.step,
                total_steps=self.total_steps,
                fraction=spent,
                loss=sum(losses) / len(losses),
                tokens_per_second=self.clock.speed(counters.tokens),
                seconds_left=counters.seconds * (1.0 - spent) / spent,
            )
        )

    # --- the budget ---------------------------------------------------------------------------------------------------

    def _plan(self, make_task: MakeTask) -> int:
        """Return the number of steps; equal in every process."""
        steps = plan_steps(self.config, make_task, self.training_flops, self.updater.seconds_per_step)
        return int(broadcast_number(self.accelerator, steps))

    def _spent(self) -> float:
        """Return the spent share of the budget; equal in every process.

        Clocks differ between processes, so the main process's clock counts for all.
        """
        if self.config.minutes is None:
            return self.counters.step / self.total_steps
        return broadcast_number(self.accelerator, self.clock.read() / (60 * self.config.minutes))

    # --- evaluation and checkpoints -----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate the model and append a row of metrics.

        Raises:
            NonFiniteLossError: a metric is not finite.
        """
        counters = self.counters
        metrics = evaluate(
            self.model,
            self.task,
            self.config.batch_size // self.updater.micro_batches,
            precision=self.config.precision,
            process_index=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            sum_over_processes=self.accelerator.reduce,
        )
        row: MetricsRow = {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "seconds": counters.seconds,
            "tokens_per_second": self.clock.speed(counters.tokens),
            "train_loss": sum(self.losses) / len(self.losses),
            **metrics,
        }
        self.losses.clear()
        for value in metrics.values():
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteLossError(counters.step, self.structure, value)
        if self.accelerator.is_main_process:
            self.metrics.append(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=counters.step)
        self.progress.on_evaluation(row)

    def _save(self) -> None:
        """Write a checkpoint.

        Call it right after an evaluation, when no loss is pending.
        """
        random_states = gather_random_states(self.accelerator)
        if not self.accelerator.is_main_process:
            return
        state: State = {
            "run": describe_run(self.config, self.model, self.accelerator.num_processes),
            "total_steps": self.total_steps,
            "counters": asdict(self.counters),
            "metrics_size": self.metrics.size,
            "model": self.model.state_dict(),
            "optimizer": self.updater.optimizer.state_dict(),
            "random": random_states,
        }
        self.progress.on_checkpoint(save_checkpoint(self.folder / "checkpoints", self.counters.step, state))

    def _restore(self, state: State) -> None:
        check_same_run(state["run"], describe_run(self.config, self.model, self.accelerator.num_processes), self.folder)
        self.total_steps = state["total_steps"]
        self.model.load_state_dict(state["model"])
        self.updater.optimizer.load_state_dict(state["optimizer"])
        self.counters = _Counters(**state["counters"])
        set_random_state(self.accelerator, state["random"])
