"""Hold a tiny task: a new one needs its file and a registry line."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from structattn.cli import main
from structattn.cli.task_options import train_options
from structattn.comparison.compare import Comparison, compare
from structattn.comparison.results import Results
from structattn.comparison.run import ModelSizes, RunConfig, load_run
from structattn.drawing.style import new_figure
from structattn.models import LanguageModel
from structattn.reporting.report import write_report
from structattn.reporting.table import table
from structattn.reporting.verdict import verdict
from structattn.tasks import TASKS, Task, TaskCommand, TaskFigure, TaskProfile, build_task, profile_of
from structattn.tasks.randomness import Stream, generator
from structattn.training import TrainConfig
from tests.tasks.battery import TaskBattery


@dataclass(frozen=True)
class CopyConfig:
    """Settings of copying over a distance."""

    context_length: int = 16
    """Tokens of a sequence."""

    distance: int = 3
    """Places between a token and its copy, as in `tokens[t - distance]`."""

    alphabet: str = "plain"


class CopyTask(Task):
    """Random tokens; the target at each place is the token `distance` places before it."""

    name = "copy"
    units: ClassVar = {"error_rate": "share of wrong tokens", "nats": "nats per token"}
    evaluation_size = 8

    def __init__(self, config, *, seed=0):
        super().__init__(seed)
        self.config = config

    @property
    def context_length(self):
        return self.config.context_length

    @property
    def data_summary(self):
        return f"random tokens, to copy over {self.config.distance} places"

    def loss(self, outputs, batch):
        if outputs.shape != (*batch["targets"].shape, 96):
            raise ValueError(f"outputs must be logits of 96 tokens, got {tuple(outputs.shape)}")
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["targets"].flatten())

    @torch.no_grad()
    def totals(self, outputs, batch):
        nats = self.loss(outputs, batch).double()
        wrong = (outputs.argmax(-1) != batch["targets"]).double().mean(-1).sum()
        rows = len(batch["targets"])
        return {"wrong": wrong, "nats": nats * rows, "rows": wrong.new_tensor(rows)}

    def metrics(self, totals):
        return {name: (totals[total] / totals["rows"]).item() for name, total in COLUMNS.items()}

    def _training_rows(self, step, batch_size, rows):
        return self._rows([generator(self.seed, Stream.TRAINING_PROMPT, step, row) for row in rows])

    def _evaluation_rows(self, rows):
        return self._rows([generator(0, Stream.EVALUATION_PROMPT, 0, row) for row in rows])

    def _rows(self, generators):
        length = self.context_length + self.config.distance
        tokens = torch.from_numpy(np.stack([each.integers(96, size=length) for each in generators]))
        inputs, targets = tokens[:, self.config.distance :], tokens[:, : self.context_length]
        return {"inputs": inputs.contiguous(), "targets": targets.contiguous()}


COLUMNS = {"error_rate": "wrong", "nats": "nats"}


def _draw(results):
    figure = new_figure(3, 2)
    names = list(results.ranking)
    figure.add_subplot().bar(names, [results.estimate(name, "error_rate").mean for name in names])
    return figure


COPY = TaskProfile(
    name="copy",
    config=CopyConfig,
    build=lambda config, seed, total_steps: CopyTask(config, seed=seed),
    model=lambda: LanguageModel,
    question="Which attention structure copies best?",
    setting="Each model says the token of some places before.",
    quantity="share of wrong tokens",
    short_quantity="share",
    columns={"error_rate": "wrong", "nats": "nats/token"},
    baselines=lambda task: {"guessing": {"error_rate": 1 - 1 / 96, "nats": 4.564}},
    baselines_compete=True,
    figures=(TaskFigure("wrong", "Wrong tokens", "How many tokens are wrong.", _draw),),
    unmeasured=("Copying over other distances.",),
    command=TaskCommand(
        summary="Copying over a distance.",
        compared=("standard", "mlr:4,4"),
        trained="mlr:4,4",
        examples="standard, mlr",
        presets={
            "tiny": {"context_length": 12, "layers": 1, "dim": 16, "heads": 2, "batch_size": 4, "steps": 3},
            "wide": {"context_length": 12, "layers": 1, "dim": 32, "heads": 4, "batch_size": 4, "steps": 3},
        },
        hidden=("alphabet",),
    ),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "copy", COPY)


class TestCopyTask(TaskBattery):
    def make(self, seed=0):
        return build_task(CopyConfig(), seed=seed, total_steps=100)

    def outputs(self, batch):
        return F.one_hot(batch["inputs"], 96).float()


def test_a_new_task_is_compared_and_reported(tmp_path):
    sizes = ModelSizes(layers=1, dim=16, heads=2)
    comparison = Comparison(("standard", "mlr:4,4"), CopyConfig(), sizes, TrainConfig(steps=3, batch_size=4))
    results = compare(comparison, tmp_path)
    write_report(results, tmp_path)
    assert results == Results.load(tmp_path)
    made = table(results)
    assert made.headings[4:6] == ("wrong", "nats/token")
    assert {row.cells[0] for row in made.rows} == {"standard", "mlr:4,4", "guessing"}
    assert "share" in verdict(results).answer
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for sentence in (COPY.question, COPY.setting, "to copy over 3 places", "Copying over other distances."):
        assert sentence in page
    assert (tmp_path / "figures" / "wrong.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "loss-steps.svg").exists()
    config, model = load_run(tmp_path / results.runs[0].folder)
    assert config.task == CopyConfig()
    assert isinstance(model, LanguageModel)
    assert profile_of(config.task) is COPY


def _help(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_new_task_has_its_subcommands(command, capsys, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.setenv("COLUMNS", "120")
    assert "copy Copying over a distance." in _help([command], capsys)
    printed = _help([command, "copy"], capsys)
    words = "Places between a token and its copy, as in tokens[t - distance]."
    assert f"--distance INT {words} (default: 3)" in printed
    assert "Tokens of a sequence. (default: the preset's, 12 for tiny)" in printed
    assert "training: tiny, wide;" in printed
    assert "--alphabet" not in printed


def test_a_new_task_is_compared_by_the_command(tmp_path, capsys):
    pytest.importorskip("tyro")
    command = ["compare", "copy", "--out", str(tmp_path)]
    assert main([*command, "--distance", "2", "--steps", "2", "--preset", "wide"]) == 0
    config = RunConfig.from_dict(json.loads((tmp_path / "runs" / "mlr-4-4-seed0" / "run.json").read_text()))
    assert config.task == CopyConfig(12, 2)
    assert config.sizes == ModelSizes(layers=1, dim=32, heads=4)
    assert (config.train.steps, config.train.batch_size, config.train.mup) == (2, 4, True)
    assert main([*command, "--preset", "tinny"]) == 1
    assert "preset must be one of tiny, wide, got 'tinny'; did you mean 'tiny'?" in capsys.readouterr().err
    assert main([*command, "--distance", "3", "--steps", "2", "--preset", "wide"]) == 1
    assert "task.distance was 2, is 3" in capsys.readouterr().err


def test_a_new_task_is_trained_by_the_command(tmp_path, capsys):
    pytest.importorskip("tyro")
    assert main(["train", "copy", "--out", str(tmp_path)]) == 0
    config, _ = load_run(tmp_path / "runs" / "mlr-4-4-seed0")
    assert config.task == CopyConfig(context_length=12)
    assert main(["info"]) == 0
    assert "presets of copy" in capsys.readouterr().out


def test_a_field_with_the_name_of_a_shared_option_is_refused():
    @dataclass(frozen=True)
    class Config:
        seeds: int = 1

    with pytest.raises(ValueError, match=r"a field of Config must not be named as a shared option, got 'seeds'"):
        train_options(dataclasses.replace(COPY, config=Config), COPY.command)


def test_a_task_that_is_not_registered_is_named():
    with pytest.raises(TypeError, match=r"config must be a LanguageConfig, RegressionConfig, .*, got ModelSizes"):
        RunConfig("standard", ModelSizes(1, 16, 2), ModelSizes(1, 16, 2), TrainConfig(steps=1)).build_model()
