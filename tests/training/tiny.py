"""A model and a task so small that a step takes a few milliseconds, and the same run in float64."""

import functools
from pathlib import Path

import torch

from structattn.models import RegressionModel, RegressionModelConfig
from structattn.tasks import RegressionConfig, RegressionTask
from structattn.training import TrainConfig, train
from tests.tolerance import assert_calibrated

TASK = RegressionConfig(input_dim=6, curriculum=0.5, evaluation_prompts=24)


def make_task(total_steps, config=TASK):
    return RegressionTask(config, seed=3, total_steps=total_steps)


def make_model(**fields):
    torch.manual_seed(1)
    sizes = {"layers": 1, "dim": 16, "heads": 2, "context_length": 24, "input_dim": 6}
    return RegressionModel(RegressionModelConfig(**sizes | fields))


def make_config(**fields):
    return TrainConfig(
        **{"steps": 12, "batch_size": 4, "evaluation_interval": 3, "base_dim": 16, "precision": "float32"} | fields
    )


def run(folder, *, model=None, task=make_task, progress=None, dropout=0.0, **fields):
    """Train a tiny model in `folder`; a second call resumes the run."""
    model = make_model(dropout=dropout) if model is None else model
    return train(model, task, make_config(**fields), Path(folder), progress=progress)


run_with_dropout = functools.partial(run, dropout=0.2)


class DoubleTask(RegressionTask):
    """The same prompts in float64."""

    def _prompts(self, *args):
        return {name: tensor.double() for name, tensor in super()._prompts(*args).items()}


def exact_run(folder, *, config=TASK, **fields):
    """Do the same run in float64."""

    def task(total_steps):
        return DoubleTask(config, seed=3, total_steps=total_steps)

    return run(folder, model=make_model().double(), task=task, **fields)


def assert_same_numbers(rows, plain, exact):
    """Losses and errors of `rows` deviate from float64's at most twice as much as the plain float32 run's do."""

    def numbers(rows, dtype):
        return torch.tensor([[row["train_loss"], *row["error_by_position"]] for row in rows], dtype=dtype)

    assert [row["step"] for row in rows] == [row["step"] for row in plain]
    assert_calibrated(numbers(rows, torch.float32), numbers(exact, torch.float64), numbers(plain, torch.float32))
