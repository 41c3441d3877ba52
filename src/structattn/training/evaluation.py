"""Metrics of a model on a task's held-out set."""

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
    """What the model says about a batch, matrix products in `precision`."""
    inputs = batch["inputs"]
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=uses_bfloat16(precision, inputs.device)):
        predictions: Tensor = model(inputs).logits
    return predictions


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    task: Task,
    batch_size: int,
    *,
    precision: Precision = "float32",
    rank: int = 0,
    world_size: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float | list[float]]:
    """The task's metrics over its whole held-out set.

    Args:
        model: on any device; its mode (training or not) is left as it was.
        task: the held-out set and the metrics.
        batch_size: rows of a forward pass.
        precision: type of the matrix products.
        rank: the part of the set that this process computes.
        world_size: number of processes.
        add_up: sums a tensor over processes.

    Returns:
        Numbers by the names in `task.units`.
    """
    was_training = model.training
    model.eval()
    totals: Totals = {}
    for batch in task.evaluation_batches(batch_size, rank=rank, world_size=world_size):
        moved = move(batch, model.device)
        for name, total in task.totals(predict(model, moved, precision), moved).items():
            totals[name] = totals[name] + total if name in totals else total
    model.train(was_training)
    return task.metrics({name: add_up(total) for name, total in totals.items()})
