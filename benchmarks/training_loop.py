"""Measure the overhead of the training loop: `python -m benchmarks.training_loop --out loop.json`.

Timers wrap the loop's functions during a short run of a preset. The times of a step and of an evaluation give the share
of a run with the preset's budget that is not spent in the model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.output import write_json
from structattn.comparison.environment import environment
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.training import Preset, TrainConfig, loop, preset
from structattn.training.budget import evaluation_cost, evaluation_interval, plan_steps


class Timers:
    """Total seconds and calls of functions by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, owner: Any, attribute: str, name: str) -> Any:
        """Return a patch that times calls of `owner.attribute` under `name`."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        return mock.patch.object(owner, attribute, wrapped)


def measure(name: str, attention: str, data: str, steps: int, evaluation_tokens: int | None) -> dict[str, Any]:
    """Time the parts of a step and of an evaluation.

    Extrapolates to the preset's budget.
    """
    row = preset(name)
    task = LanguageTask(LanguageConfig(data, row.context_length, evaluation_tokens or row.evaluation_tokens))
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**row.sizes(), attention=attention, standard_kernel="torch"))
    config = TrainConfig(steps=steps, batch_size=row.batch_size, evaluation_interval=max(1, steps // 3))
    timers = Timers()
    with contextlib.ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for owner, attribute, part in [
            (task, "batch", "data"),
            (loop._Run, "_step", "step"),
            (loop._Run, "_report", "report"),
            (loop, "evaluate", "evaluation"),
            (loop._Run, "_evaluate", "evaluation and metrics"),
            (loop._Run, "_save", "save"),
            (loop._Run, "train_to_end", "run"),
        ]:
            patches.enter_context(timers.timed(owner, attribute, part))
        loop.train(model, lambda total_steps: task, config, Path(folder))
    seconds, evaluations = timers.seconds, timers.calls["evaluation"]
    outside = seconds["run"] - seconds["step"] - seconds["report"] - seconds["evaluation and metrics"] - seconds["save"]
    step = {
        "model": seconds["step"] - seconds["data"],
        "data": seconds["data"],
        "report": seconds["report"],
        "loop": outside,
    }
    evaluation = {
        "evaluation": seconds["evaluation"],
        "metrics": seconds["evaluation and metrics"] - seconds["evaluation"],
        "checkpoint": seconds["save"],
    }
    per_step = {part: 1e3 * total / steps for part, total in step.items()}
    per_evaluation = {part: 1e3 * total / evaluations for part, total in evaluation.items()}
    return {
        "preset": name,
        "attention": attention,
        "tokens per step": row.batch_size * row.context_length,
        "evaluation tokens": task.evaluation_size * row.context_length,
        "ms per step": per_step,
        "ms per evaluation": per_evaluation,
        "whole run": _whole_run(row, model, task, per_step, per_evaluation),
    }


def _whole_run(
    row: Preset, model: LanguageModel, task: LanguageTask, per_step: dict[str, float], per_evaluation: dict[str, float]
) -> dict[str, float]:
    """Return the share of each part in a whole run.

    The run has the preset's budget.
    """
    config = TrainConfig(flops=row.flops, batch_size=row.batch_size)
    steps = plan_steps(config, lambda total: task, lambda length: model.flops(length).training, lambda task: 0.0)
    cost = evaluation_cost(task, row.batch_size, model)
    evaluations = -(-steps // evaluation_interval(config, steps, cost))
    in_steps, in_evaluations = steps * sum(per_step.values()), evaluations * sum(per_evaluation.values())
    total = in_steps + in_evaluations
    shares = {part: steps * value / total for part, value in per_step.items()}
    shares |= {part: evaluations * value / total for part, value in per_evaluation.items()}
    return {
        "steps": steps,
        "evaluations": evaluations,
        "seconds": total / 1e3,
        "overhead": 1.0 - shares["model"],
        **{f"share of {part}": share for part, share in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--attentions", nargs="+", default=["standard", "mlr+paper"])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--evaluation-tokens", type=int, help="of the held-out set; by default the preset's")
    parser.add_argument("--out", type=Path, help="where to write the JSON; otherwise it is printed")
    options = parser.parse_args()
    cases = [
        measure(options.preset, attention, options.data, options.steps, options.evaluation_tokens)
        for attention in options.attentions
    ]
    write_json({"environment": environment(), "cases": cases}, options.out)


if __name__ == "__main__":
    main()
