"""Do a step of AdamW over micro-batches and processes."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.tasks import Batch, Task
from structattn.training.config import TrainConfig
from structattn.training.evaluation import move, predict
from structattn.training.mup import parameter_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

    from structattn.models import StructuredModel

_TIMED_STEPS = 3


class Updater:
    """Model and optimiser of one process, for its share of batches.

    Args:
        accelerator: joins the processes.
        model: updated in place; on the accelerator's device.
        config: optimiser, batch size, micro-batches and precision.

    Raises:
        ValueError: the batch does not divide among processes and micro-batches.
    """

    def __init__(self, accelerator: Accelerator, model: StructuredModel, config: TrainConfig) -> None:
        self.accelerator, self.model, self.config = accelerator, model, config
        self.micro_batches = accelerator.num_processes * config.micro_batches
        """Micro-batches of a step, over all processes."""
        if config.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size must be a multiple of {accelerator.num_processes} processes times "
                f"{config.micro_batches} micro-batches, got {config.batch_size}"
            )
        groups = parameter_groups(model, config)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        fused = accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=fused)
        compiled = torch.compile(model) if config.compile else model
        self.wrapped, self.optimizer = accelerator.prepare(compiled, optimizer)

    def step(self, task: Task, step: int, rate_factor: float) -> Tensor:
        """Take training step `step` at `rate_factor` times the peak rates.

        Returns:
            The mean loss of this process's rows, on the device: reading it waits for the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor
        loss = self.gradient(task, step)
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradient(self, task: Task, step: int) -> Tensor:
        """Accumulate the gradient of this process's rows; return their mean loss."""
        micro_batches = self.config.micro_batches
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in range(micro_batches):
            rank = self.accelerator.process_index * micro_batches + micro_batch
            batch = task.batch(step, self.config.batch_size, rank=rank, world_size=self.micro_batches)
            # Processes exchange gradients once, with the last micro-batch.
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(self.wrapped, task, batch) / micro_batches
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def seconds_per_step(self, task: Task) -> float:
        """Time forward and backward of this process; leave the model unchanged."""
        batch = task.batch(0, self.config.batch_size, world_size=self.micro_batches)
        times = []
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            self._loss(self.model, task, batch).backward()
            self.model.zero_grad()
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize(self.accelerator.device)
            times.append(time.perf_counter() - start)
        return min(times) * self.config.micro_batches

    def _loss(self, model: torch.nn.Module, task: Task, batch: Batch) -> Tensor:
        moved = move(batch, self.accelerator.device)
        return task.loss(predict(model, moved, self.config.precision), moved)
