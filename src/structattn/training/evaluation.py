"""Evaluate a model on a task's held-out set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.tasks import Batch, Task, Totals
from structattn.training.precision import Precision, uses_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict(model: torch.nn.Module, batch: Batch, precision: Precision) -> Tensor:
    """Return the model's output for a batch, with matrix products in `precision`."""
    inputs = batch["inputs"]
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=uses_bfloat16(precision, inputs.device)):
        predictions: Tensor = model(inputs).logits
    return predictions


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    task: Task,
    batch_size: int,
    *,
    precision: Precision = "float32",
    process_index: int = 0,
    world_size: int = 1,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float | list[float]]:
    """Return the task's metrics over its whole held-out set.

    Args:
        model: on any device; its training mode is restored afterwards.
        task: gives the held-out set and the metrics.
        batch_size: rows of a forward pass.
        precision: dtype of matrix products.
        process_index: index of this process, which evaluates its part of the set.
        world_size: number of processes.
        sum_over_processes: adds up a tensor over processes.

    Returns:
        Metrics by their names in `task.units`.
    """
    was_training = model.training
    model.eval()
    totals: Totals = {}
    for batch in task.evaluation_batches(batch_size, rank=process_index, world_size=world_size):
        moved = move(batch, model.device)
        for name, total in task.totals(predict(model, moved, precision), moved).items():
            totals[name] = totals[name] + total if name in totals else total
    model.train(was_training)
    return task.metrics({name: sum_over_processes(total) for name, total in totals.items()})
