"""The training loop: one call that begins a run, or goes on with it wherever it was stopped.

A step's data are a pure function of (seed, step), so a checkpoint holds no state of an iterator: model, optimiser,
counters, random numbers and the length of metrics.jsonl are all there is. Killed at any moment and called again in
the same way, a run writes the metrics it would have written, to the bit, except for the clock's columns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from structattn.tasks import Batch, Task, Totals
from structattn.training.budget import MakeTask, evaluation_interval, plan_steps
from structattn.training.checkpoint import State, restore_checkpoint, save_checkpoint
from structattn.training.config import TrainConfig
from structattn.training.errors import NonFiniteLossError
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
    with torch.random.fork_rng():
        run = _Run(model, make_task, config, folder, structure or str(model.config.attention), progress or Progress())
        try:
            return run.finish()
        finally:
            run.close()


@dataclass
class _Counters:
    """Where a run stands: all that changes from step to step beside the tensors."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    """Of the training losses since the last evaluation."""
    loss_count: int = 0


@dataclass
class _Clock:
    """Seconds of training: stopped while the run evaluates and writes."""

    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def read(self) -> float:
        """Seconds so far; counting goes on."""
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now
        return self.seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside does not count."""
        self.read()
        yield
        self.started = time.perf_counter()


class _Run:
    """One run in one process."""

    def __init__(
        self,
        model: StructuredModel,
        make_task: MakeTask,
        config: TrainConfig,
        folder: Path,
        structure: str,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.structure = config, folder, structure
        self.accelerator = _accelerator(config, folder)
        self.progress = progress if self.accelerator.is_main_process else Progress()
        self.parts = self.accelerator.num_processes * config.micro_batches
        if config.batch_size % self.parts:
            raise ValueError(
                f"batch_size must be a multiple of {self.accelerator.num_processes} processes times "
                f"{config.micro_batches} micro-batches, got {config.batch_size}"
            )
        self.device = self.accelerator.device
        self.model = model.to(self.device)
        self.costs: dict[int, int] = {}
        torch.manual_seed(config.seed + self.accelerator.process_index)
        restored = restore_checkpoint(folder / "checkpoints")
        self.damaged = restored.damaged
        self.counters = _Counters()
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        if restored.state is None:
            self.total_steps = self._plan(make_task)
        else:
            self._check_same_run(restored.state)
            self.total_steps = restored.state["total_steps"]
        self.task = make_task(self.total_steps)
        groups = parameter_groups(model, config)
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=fused)
        compiled = torch.compile(model) if config.compile else model
        self.wrapped, self.optimizer = self.accelerator.prepare(compiled, optimizer)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if restored.state is not None:
            self._restore(restored.state)
        if self.accelerator.is_main_process:
            self.metrics.truncate(restored.state["metrics_size"] if restored.state else 0)
        self.accelerator.wait_for_everyone()
        self.interval = evaluation_interval(config, self.total_steps, self._evaluation_cost())
        self.clock = _Clock(self.counters.seconds)
        self.first = (self.counters.tokens, self.counters.seconds)
        self.pending: list[Tensor] = []

    def finish(self) -> TrainResult:
        """Run to the end of the budget."""
        self.progress.on_start(self.counters.step, self.total_steps, self.damaged)
        self.wrapped.train()
        done = self._spent()
        while done < 1.0:
            self._step(done)
            done = self._spent()
            due = done >= 1.0 or self.counters.step % self.interval == 0
            if due or self.counters.step % _REPORT_INTERVAL == 0:
                self._collect_losses(done)
            if due:
                with self.clock.stopped():
                    self._evaluate()
                    self._save()
        counters, rows = self.counters, self.metrics.rows()
        self.progress.on_end(rows[-1])
        return TrainResult(counters.step, counters.tokens, counters.flops, counters.seconds, rows, self.damaged)

    def close(self) -> None:
        """Finish what the trackers have open; the process group stays, for the next run."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, spent: float) -> None:
        """One step of the optimiser, at the rate for a run of which `spent` is behind it."""
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
        """Add the gradient of this process's share of the batch; returns its mean loss, on the device."""
        micro_batches = self.config.micro_batches
        total = torch.zeros((), device=self.device)
        for micro_batch in range(micro_batches):
            part = self.accelerator.process_index * micro_batches + micro_batch
            batch = self._move(self.task.batch(step, self.config.batch_size, rank=part, world_size=self.parts))
            last = micro_batch == micro_batches - 1
            # Processes exchange gradients once, with the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.task.loss(self._predict(self.wrapped, batch), batch) / micro_batches
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _predict(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            predictions: Tensor = model(batch["inputs"]).logits
        return predictions

    def _move(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _collect_losses(self, spent: float) -> None:
        """Read the losses since the last report, which waits for the device, and stop if one is not finite."""
        counters = self.counters
        losses: list[float] = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        first = counters.step - len(losses)
        self.pending.clear()
        for step, loss in enumerate(losses, start=first):
            if not torch.isfinite(torch.tensor(loss)):
                raise NonFiniteLossError(step, self.structure, loss)
        counters.loss_sum += sum(losses)
        counters.loss_count += len(losses)
        counters.seconds = self.clock.read()
        self.progress.on_step(
            StepReport(
                step=counters.step,
                total_steps=self.total_steps,
                fraction=min(spent, 1.0),
                loss=sum(losses) / len(losses),
                tokens_per_second=self._tokens_per_second(),
                seconds_left=counters.seconds * (1.0 - min(spent, 1.0)) / spent,
            )
        )

    def _tokens_per_second(self) -> float:
        tokens, seconds = self.first
        return (self.counters.tokens - tokens) / max(self.counters.seconds - seconds, 1e-9)

    # --- budget -------------------------------------------------------------------------------------------------------

    def _plan(self, make_task: MakeTask) -> int:
        steps = plan_steps(self.config, make_task, self._training_flops, self._seconds_per_step)
        return int(self._agree(steps))

    def _spent(self) -> float:
        """Share of the budget that is spent; the same number in every process."""
        if self.config.minutes is None:
            return self.counters.step / self.total_steps
        return self._agree(self.clock.read() / (60 * self.config.minutes))

    def _agree(self, number: float) -> float:
        """The main process's `number`: clocks differ, decisions must not."""
        if self.accelerator.num_processes == 1:
            return number
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(number, dtype=torch.float64, device=self.device)).item())

    def _seconds_per_step(self, task: Task) -> float:
        """Time of a forward and backward pass on one process's share of a batch, the model unchanged."""
        with torch.random.fork_rng():
            batch = self._move(task.batch(0, self.config.batch_size, rank=0, world_size=self.parts))
            times = []
            for _ in range(_TIMED_STEPS):
                start = time.perf_counter()
                task.loss(self._predict(self.model, batch), batch).backward()
                self.model.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return min(times) * self.config.micro_batches

    def _training_flops(self, length: int) -> int:
        """FLOPs of one training sequence of `length` tokens."""
        if length not in self.costs:
            self.costs[length] = self.model.flops(length).training
        return self.costs[length]

    def _evaluation_cost(self) -> float:
        """FLOPs of an evaluation over those of a training step."""
        length = self.task.context_length
        evaluation = self.task.evaluation_size * self.model.flops(length).forward
        return evaluation / (self.config.batch_size * self._training_flops(length))

    # --- evaluation and checkpoints -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Metrics on the held-out set, one row of metrics.jsonl."""
        counters = self.counters
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model.eval()
        totals: Totals = {}
        rows = max(1, self.config.batch_size // self.parts)
        for batch in self.task.evaluation_batches(rows, rank=rank, world_size=world_size):
            moved = self._move(batch)
            for name, total in self.task.totals(self._predict(self.model, moved), moved).items():
                totals[name] = totals[name] + total if name in totals else total
        self.model.train()
        summed = {name: self.accelerator.reduce(total, reduction="sum") for name, total in totals.items()}
        metrics = self.task.metrics(summed)
        row = {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "seconds": counters.seconds,
            "tokens_per_second": self._tokens_per_second(),
            "train_loss": counters.loss_sum / counters.loss_count,
            **metrics,
        }
        counters.loss_sum, counters.loss_count = 0.0, 0
        if self.accelerator.is_main_process:
            self.metrics.append(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
        self.accelerator.log(numbers, step=counters.step)
        self.progress.on_evaluation(row)

    def _save(self) -> None:
        """A checkpoint that holds everything the run depends on."""
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
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters = _Counters(**state["counters"])
        _set_random_state(state["random"][self.accelerator.process_index], self.device)

    def _description(self) -> dict[str, Any]:
        """What must be equal for a run to go on: as text, so that a difference can be shown."""
        training = {name: repr(value) for name, value in asdict(self.config).items()}
        model = {f"model.{name}": repr(value) for name, value in self.model.config.to_diff_dict().items()}
        return training | model | {"processes": repr(self.accelerator.num_processes)}

    def _check_same_run(self, state: State) -> None:
        saved, mine = state["run"], self._description()
        for name in sorted(saved.keys() | mine.keys()):
            if saved.get(name) != mine.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {saved.get(name)}, which cannot go on with "
                    f"{name} = {mine.get(name)}; choose another folder"
                )


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=config.cpu, log_with=list(config.trackers) or None, project_dir=folder)
    if config.trackers:
        accelerator.init_trackers("structattn")
    return accelerator


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
