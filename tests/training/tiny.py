"""A model and a task so small that a step takes a few milliseconds."""

import functools
from pathlib import Path

import torch

from structattn.models import RegressionModel, RegressionModelConfig
from structattn.tasks import RegressionConfig, RegressionTask
from structattn.training import TrainConfig, train

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
    """A tiny run in `folder`: the same call begins it and goes on with it."""
    model = make_model(dropout=dropout) if model is None else model
    return train(model, task, make_config(**fields), Path(folder), progress=progress)


run_with_dropout = functools.partial(run, dropout=0.2)
