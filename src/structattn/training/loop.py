"""The training loop: one call that begins a run, or goes on with it wherever it was stopped.

A step's data are a pure function of (seed, step), so a checkpoint holds no state of an iterator: model, optimiser,
counters, random numbers and the length of metrics.jsonl are all there is. Killed at any moment and called again in
the same way, a run writes the metrics it would have written, to the bit, except for the clock's columns.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.tasks import Batch, Task
from structattn.training.budget import MakeTask, evaluation_interval, plan_steps
from structattn.training.checkpoint import State, restore_checkpoint, save_checkpoint
from structattn.training.clock import Clock
from structattn.training.config import TrainConfig
from structattn.training.errors import NonFiniteLossError, RunFolderError
from structattn.training.evaluation import evaluate, move, predict
from structattn.training.metrics import MetricsFile, Row
from structattn.training.mup import parameter_groups
from structattn.training.progress import Progress, StepReport
from structattn.training.schedule import rate_factor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from structattn.models import StructuredModel

_REPORT_INTERVAL = 10
_TIMED_STEPS = 3


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has to say."""

    steps: int
    """Steps done."""

    tokens: int
    """Tokens trained on."""

    flops: int
    """Training FLOPs, forward and backward."""

    seconds: float
    """Seconds of training, evaluations and checkpoints not counted, all sessions of the run together."""

    metrics: list[Row]
    """Every evaluation, the last one at the end of the run."""

    damaged_checkpoints: tuple[Path, ...] = ()
    """Files that were damaged and skipped when this call resumed the run."""


def train(
    model: StructuredModel,
    make_task: MakeTask,
    config: TrainConfig,
    folder: Path,
    *,
    structure: str | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `model` in place until the budget is spent, from the newest checkpoint in `folder` if there is one.

    Writes `metrics.jsonl` and `checkpoints/` into `folder`. Runs in one process, or in every process that `torchrun`
    started, which then share each batch.

    Args:
        model: a fresh model; equal calls need equally initialised ones.
        make_task: data, loss and metrics of a run of so many steps.
        config: budget, optimiser and so on.
        folder: of this run alone; made where it is missing.
        structure: name of the model for messages; by default its attention.
        progress: is told how the run goes, on the main process.

    Returns:
        The counters and all evaluations.

    Raises:
        ValueError: the budget is below one step, the batch does not divide among processes and micro-batches, or
            `folder` holds a run of another config.
        NonFiniteLossError: the loss is NaN or infinite.
        RunFolderError: a file cannot be written, or a file of the run is missing.
    """
    accelerator = _accelerator(config, folder)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            run = _Run(accelerator, model, config, folder, structure or str(model.config.attention), progress)
            run.begin(make_task)
            return run.finish()
    finally:
        # The process group stays, for the next run.
        for tracker in accelerator.trackers:
            tracker.finish()


@dataclass
class _Counters:
    """Where a run stands: all that changes from step to step beside the tensors."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0


class _Run:
    """One run in one process."""

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
        self.device = accelerator.device
        self.model = model.to(self.device).train()
        self.progress = progress if progress is not None and accelerator.is_main_process else Progress()
        self.processes = accelerator.num_processes
        self.parts = self.processes * config.micro_batches
        if config.batch_size % self.parts:
            raise ValueError(
                f"batch_size must be a multiple of {self.processes} processes times {config.micro_batches} "
                f"micro-batches, got {config.batch_size}"
            )
        groups = parameter_groups(model, config)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=self.device.type in ("cpu", "cuda"))
        compiled = torch.compile(model) if config.compile else model
        self.wrapped, self.optimizer = accelerator.prepare(compiled, optimizer)
        self.counters = _Counters()
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.losses: list[float] = []
        """Of the steps since the last evaluation."""
        self.pending: list[Tensor] = []
        """Losses that were not read from the device yet."""
        self._costs: dict[int, int] = {}

    def begin(self, make_task: MakeTask) -> None:
        """From the newest checkpoint, or from the start."""
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
        if self.task.evaluation_size < self.processes:
            raise ValueError(f"an evaluation needs a row for each process, got {self.task.evaluation_size} rows")
        self.interval = evaluation_interval(self.config, self.total_steps, self._evaluation_cost())
        self.clock = Clock(self.counters.seconds, self.counters.tokens)

    def finish(self) -> TrainResult:
        """Run to the end of the budget."""
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
        """One step of the optimiser, at the rate of a run that has spent this share of its budget."""
        config, counters = self.config, self.counters
        if config.minutes is None:
            spent += 0.5 / self.total_steps  # The middle of the step, so that no step has rate zero.
        factor = rate_factor(spent, warmup=config.warmup, schedule=config.schedule, final=config.final_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.pending.append(self._gradient(counters.step))
        if config.clip:
            self.accelerator.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        length = self.task.sequence_length(counters.step)
        counters.step += 1
        counters.tokens += config.batch_size * length
        counters.flops += config.batch_size * self._training_flops(length)

    def _gradient(self, step: int) -> Tensor:
        """Add the gradient of this process's share of the batch; returns the share's mean loss, on the device."""
        micro_batches = self.config.micro_batches
        total = torch.zeros((), device=self.device)
        for micro_batch in range(micro_batches):
            part = self.accelerator.process_index * micro_batches + micro_batch
            batch = self.task.batch(step, self.config.batch_size, rank=part, world_size=self.parts)
            # Processes exchange gradients once, with the last micro-batch.
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(self.wrapped, self.task, batch) / micro_batches
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _loss(self, model: torch.nn.Module, task: Task, batch: Batch) -> Tensor:
        moved = move(batch, self.device)
        return task.loss(predict(model, moved, self.config.precision), moved)

    def _report(self, spent: float) -> None:
        """Read the losses since the last report, which waits for the device, and stop if one is not finite."""
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
        return int(self._agree(plan_steps(self.config, make_task, self._training_flops, self._seconds_per_step)))

    def _spent(self) -> float:
        """Share of the budget that is spent; the same number in every process."""
        if self.config.minutes is None:
            return self.counters.step / self.total_steps
        return self._agree(self.clock.read() / (60 * self.config.minutes))

    def _agree(self, number: float) -> float:
        """The main process's `number`: clocks differ, decisions must not."""
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(number, dtype=torch.float64, device=self.device)).item())

    def _seconds_per_step(self, task: Task) -> float:
        """Time of a forward and backward pass on this process's share of a batch; the model is left as it was."""
        batch = task.batch(0, self.config.batch_size, world_size=self.parts)
        times = []
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            self._loss(self.model, task, batch).backward()
            self.model.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times) * self.config.micro_batches

    def _training_flops(self, length: int) -> int:
        """FLOPs of one training sequence of `length` tokens."""
        if length not in self._costs:
            self._costs[length] = self.model.flops(length).training
        return self._costs[length]

    def _evaluation_cost(self) -> float:
        """FLOPs of an evaluation over those of a training step."""
        length = self.task.context_length
        evaluation = self.task.evaluation_size * self.model.flops(length).forward
        return evaluation / (self.config.batch_size * self._training_flops(length))

    # --- evaluation and checkpoints -----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """One more row of metrics."""
        counters = self.counters
        metrics = evaluate(
            self.model,
            self.task,
            self.config.batch_size // self.parts,
            precision=self.config.precision,
            rank=self.accelerator.process_index,
            world_size=self.processes,
            add_up=self.accelerator.reduce,
        )
        row: Row = {
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
        """A checkpoint of everything the rest of the run depends on; made right after an evaluation."""
        from accelerate.utils import gather_object

        random_states = gather_object([_random_state(self.device)])
        if not self.accelerator.is_main_process:
            return
        state: State = {
            "run": self._description(),
            "total_steps": self.total_steps,
            "counters": asdict(self.counters),
            "metrics_size": self.metrics.size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_states,
        }
        self.progress.on_checkpoint(save_checkpoint(self.folder / "checkpoints", self.counters.step, state))

    def _restore(self, state: State) -> None:
        saved, mine = state["run"], self._description()
        for name in sorted(saved.keys() | mine.keys()):
            if saved.get(name) != mine.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {saved.get(name)}, which cannot go on with "
                    f"{name} = {mine.get(name)}; choose another folder"
                )
        self.total_steps = state["total_steps"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters = _Counters(**state["counters"])
        _set_random_state(state["random"][self.accelerator.process_index], self.device)

    def _description(self) -> dict[str, str]:
        """What must be equal for a run to go on, as text that an error can show."""
        described = {name: repr(value) for name, value in asdict(self.config).items()}
        sizes = self.model.config.to_diff_dict()
        described |= {f"model.{name}": repr(sizes[name]) for name in sizes if name != "transformers_version"}
        return described | {"processes": repr(self.processes)}


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    from accelerate import Accelerator

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(folder, f"the folder cannot be made: {error.strerror}") from error
    # Without an accelerator it must be told so, or the processes of torchrun do not find one another.
    cpu = config.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, log_with=list(config.trackers) or None, project_dir=folder)
    if accelerator.num_processes > 1:
        _leave_at_exit()
    if config.trackers:
        accelerator.init_trackers("structattn")
    return accelerator


@functools.cache
def _leave_at_exit() -> None:
    """At the end of the process, part from the others: threads of the group that still run then can abort it."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
