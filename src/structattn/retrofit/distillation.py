"""Tune a model to predict what another one predicts.

The loss is the Kullback-Leibler divergence from the teacher's next-token distribution to the student's, in nats per
token. A student that equals its teacher has divergence 0 and gradient 0, so text alone teaches it nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structattn.flops import Flops
from structattn.models.parameters import Description, ParameterRole
from structattn.tasks.language import LanguageTask
from structattn.tasks.task import Batch, Totals

_ROWS = 256
"""Rows of logits that are worked on at once: they fit in a cache."""


class _Outputs(NamedTuple):
    """Output of a model, as `train` reads it."""

    logits: Tensor


class Distillation(nn.Module):
    """A student and its teacher, as a model whose output is the divergence of every token.

    Args:
        student: causal language model of transformers; its parameters are trained.
        teacher: causal language model with the same vocabulary; it does not change.
        trained: part of the names of the parameters to train; all of them if empty.
    """

    def __init__(self, student: Any, teacher: Any, trained: str = "") -> None:
        super().__init__()
        self.student, self.config = student, student.config
        self._teacher = (teacher.eval(),)  # in a tuple: no submodule, so that checkpoints do not hold it
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(trained in name)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ValueError(f"no parameter of the model has {trained!r} in its name")

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def forward(self, inputs: Tensor) -> _Outputs:
        """Return the divergence of each token `(B, T)`, in nats, as `logits`."""
        with torch.no_grad():
            target = self._teacher[0].to(inputs.device)(inputs, use_cache=False).logits.flatten(0, 1)
        logits = self.student(inputs, use_cache=False).logits.flatten(0, 1)
        return _Outputs(divergence(logits, target).view(inputs.shape))

    def describe(self) -> dict[str, Description]:
        """Return descriptions that train every chosen tensor at the base rate."""
        return {
            name: Description(1, each.numel(), ParameterRole.GAIN)
            for name, each in self.named_parameters()
            if each.requires_grad
        }

    def flops(self, length: int) -> Flops:
        """Return the FLOPs of a row by parameter count: 2 for each weight and token forward, 4 backward."""
        weights = sum(parameter.numel() for parameter in self.student.parameters())
        return Flops(2 * weights * length, 4 * weights * length)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the divergence of each row from a teacher, `(N,)` in nats, for logits of both `(N, V)`."""
    rows: Tensor = _Divergence.apply(logits, target)
    return rows


class _Divergence(torch.autograd.Function):
    """Kullback-Leibler divergence of each row, with its gradient made on the way.

    `Σ_v p_v (log p_v - log q_v)` for the teacher's `p` and the student's `q`; its gradient by the student's logits is
    `q - p`. Both are computed in float32 over a few rows at a time, so that no second set of logits is held.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Return `(N,)` in float32 for logits `(N, V)`."""
        gradient, rows = torch.empty_like(logits), []
        for logit, teacher, into in zip(*(each.split(_ROWS) for each in (logits, target, gradient)), strict=True):
            log_p = torch.log_softmax(teacher, -1, dtype=torch.float32)
            log_q = torch.log_softmax(logit, -1, dtype=torch.float32)
            p = log_p.exp()
            rows.append(torch.linalg.vecdot(p, log_p - log_q))
            into.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(gradient)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None


class DistillationTask(LanguageTask):
    """Windows of text on which a `Distillation` is trained.

    Text alone hardly asks for what stands far back. Where a window's second half is its first half again, every token
    of it does.

    Args:
        task: task with the same text and tokens.
        evaluation_tokens: tokens of the held-out text to evaluate on.
        repeats: share of the training windows whose second half is replaced by their first.
    """

    def __init__(self, task: LanguageTask, evaluation_tokens: int, repeats: float = 0.0) -> None:
        config = dataclasses.replace(task.config, evaluation_tokens=evaluation_tokens)
        super().__init__(config, seed=task.seed, corpus=task.corpus, tokenizer=task.tokenizer)
        self._repeats = repeats

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        batch = super()._training_rows(step, batch_size, rows)
        half = self.context_length // 2
        for row, place in enumerate(rows):
            index = step * batch_size + place
            if math.floor((index + 1) * self._repeats) > math.floor(index * self._repeats):
                batch["inputs"][row, -half:] = batch["inputs"][row, :half]
        return batch

    @property
    def units(self) -> Mapping[str, str]:
        """Unit of the metric."""
        return {"divergence": "nats per token"}

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean divergence."""
        return outputs.mean()

    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return the summed divergence and the number of tokens."""
        total = outputs.double().sum()
        return {"nats": total, "tokens": total.new_tensor(outputs.numel())}

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return the mean divergence."""
        return {"divergence": (totals["nats"] / totals["tokens"]).item()}
