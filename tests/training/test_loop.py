"""The training loop: it learns, counts, stops at the end of its budget, and resumes where it stopped."""

import dataclasses
import errno
import functools
import math
import os

import pytest
import torch

from structattn.models import LanguageModel, LanguageModelConfig
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.tasks.characters import encode
from structattn.tasks.corpus import Corpus
from structattn.training import WALL_CLOCK, NonFiniteLossError, Progress, RunFolderError, TrainConfig
from structattn.training.checkpoint import load_checkpoint, restore_checkpoint, save_checkpoint
from structattn.training.evaluation import evaluate
from structattn.training.identity import check_same_run, describe_run
from structattn.training.precision import uses_bfloat16
from tests.training.tiny import TASK, assert_same_numbers, exact_run, make_model, make_task, run, run_with_dropout


def reproducible(rows):
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


FULL_LENGTH = dataclasses.replace(TASK, curriculum=0.0)
"""The task without a curriculum: every sequence has full length."""


def full_length(total_steps):
    return make_task(total_steps, FULL_LENGTH)


class StopAt(Progress):
    """Raises right after the checkpoint of a step was written."""

    def __init__(self, step):
        self.step = step

    def on_checkpoint(self, path):
        if path.name == f"step-{self.step:08d}.ckpt":
            raise InterruptedError


class Recorder(Progress):
    def __init__(self):
        self.events = []

    def on_start(self, step, total_steps, damaged):
        self.events.append(("start", step, total_steps, damaged))

    def on_step(self, report):
        self.events.append(report)

    def on_evaluation(self, row):
        self.events.append(("evaluation", row["step"]))

    def on_checkpoint(self, path):
        self.events.append(("checkpoint", path.name))

    def on_end(self, row):
        self.events.append(("end", row["step"]))


def fox_task(total_steps):
    """Return a task whose text repeats one sentence, which is easy to learn."""
    text = encode("the quick brown fox jumps over the lazy dog. " * 60)
    corpus = Corpus("fox", "0", text[:2000], text[2000:])
    return LanguageTask(LanguageConfig(context_length=32, evaluation_tokens=512), corpus=corpus)


@pytest.mark.parametrize("attention", ["standard", "mlr:8,8"])
def test_it_learns(tmp_path, attention):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(layers=1, dim=32, heads=2, context_length=32, attention=attention))
    before = evaluate(model, fox_task(1), 8)["nats_per_character"]
    result = run(tmp_path, model=model, task=fox_task, steps=60, batch_size=8, learning_rate=1e-2)
    after = result.metrics[-1]["nats_per_character"]
    assert before == pytest.approx(math.log(96))
    assert after < 1.0
    assert evaluate(model, fox_task(1), 5)["nats_per_character"] == pytest.approx(after)
    assert result.metrics[0]["train_loss"] > result.metrics[-1]["train_loss"]


def test_counters(tmp_path):
    model = make_model()
    result = run(tmp_path, model=model)
    lengths = [make_task(12).sequence_length(step) for step in range(12)]
    assert (min(lengths), max(lengths)) == (16, 24)
    assert (result.steps, result.tokens) == (12, 4 * sum(lengths))
    assert result.flops == 4 * sum(model.flops(length).training for length in lengths)
    assert [row["step"] for row in result.metrics] == [3, 6, 9, 12]
    assert result.metrics[1]["tokens"] == 4 * sum(lengths[:6])
    assert result.seconds == result.metrics[-1]["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000009.ckpt",
        "step-00000012.ckpt",
    ]


def test_the_last_step_is_evaluated_wherever_it_falls(tmp_path):
    assert [row["step"] for row in run(tmp_path, steps=5).metrics] == [3, 5]


def test_progress_is_called_at_every_event(tmp_path):
    recorder = Recorder()
    run(tmp_path, steps=6, progress=recorder)
    events = [event for event in recorder.events if isinstance(event, tuple)]
    assert events == [
        ("start", 0, 6, ()),
        ("evaluation", 3),
        ("checkpoint", "step-00000003.ckpt"),
        ("evaluation", 6),
        ("checkpoint", "step-00000006.ckpt"),
        ("end", 6),
    ]
    reports = [event for event in recorder.events if not isinstance(event, tuple)]
    assert [(report.step, report.fraction) for report in reports] == [(3, 0.5), (6, 1.0)]
    assert all(report.tokens_per_second > 0 and math.isfinite(report.loss) for report in reports)
    assert reports[-1].seconds_left == 0


def test_equal_calls_give_equal_runs(tmp_path):
    first, second = run_with_dropout(tmp_path / "a"), run_with_dropout(tmp_path / "b")
    assert reproducible(first.metrics) == reproducible(second.metrics)
    assert reproducible(run_with_dropout(tmp_path / "c", seed=1).metrics) != reproducible(first.metrics)


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    state = torch.get_rng_state()
    model = make_model(dropout=0.2)
    torch.set_rng_state(state)
    run(tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step", [3, 6, 12])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, step):
    whole = run_with_dropout(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run_with_dropout(tmp_path / "parts", progress=StopAt(step))
    recorder = Recorder()
    parts = run_with_dropout(tmp_path / "parts", progress=recorder)
    assert recorder.events[0] == ("start", step, 12, ())
    assert reproducible(parts.metrics) == reproducible(whole.metrics)
    assert (parts.steps, parts.tokens, parts.flops) == (whole.steps, whole.tokens, whole.flops)


def test_a_finished_run_is_only_reported(tmp_path):
    first = run(tmp_path)
    recorder = Recorder()
    model = make_model()
    second = run(tmp_path, model=model, progress=recorder)
    assert recorder.events == [("start", 12, 12, ()), ("end", 12)]
    assert second == first
    assert model.head.weight.abs().max() > 0  # the trained weights


def test_a_damaged_checkpoint_is_skipped(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts")
    newest = tmp_path / "parts" / "checkpoints" / "step-00000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    recorder = Recorder()
    result = run(tmp_path / "parts", progress=recorder)
    assert recorder.events[0] == ("start", 9, 12, (newest,))
    assert result.damaged_checkpoints == (newest,)
    assert newest.name in caplog.text
    assert reproducible(result.metrics) == reproducible(whole.metrics)


def test_another_config_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with learning_rate = 0.002, which cannot go on with .* = 0.1"):
        run(tmp_path, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"holds a run with model.attention = 'standard'.* = 'btt'"):
        run(tmp_path, model=make_model(attention="btt"))


@pytest.mark.parametrize(("attention", "resumes"), [("standard", True), ("mlr", False), ("mlr+paper", False)])
def test_a_run_of_version_0_1_with_mlr_is_not_continued_as_another_form(tmp_path, attention, resumes):
    described = describe_run(TrainConfig(steps=12), make_model(attention=attention), 1)
    saved = described | {"model.attention": repr(attention.removesuffix("+paper"))}  # as that version wrote it
    if resumes:
        check_same_run(saved, described, tmp_path)
        return
    with pytest.raises(ValueError, match=r"holds a run with model.attention = 'mlr', which cannot go on with"):
        check_same_run(saved, described, tmp_path)


def test_a_setting_that_an_older_checkpoint_lacks_had_its_default(tmp_path):
    whole = run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000012.ckpt"
    state = load_checkpoint(path)
    del state["run"]["micro_batches"], state["run"]["minutes"]
    save_checkpoint(path.parent, 12, state)
    with pytest.raises(ValueError, match=r"holds a run with micro_batches = 1, which cannot go on with .* = 2"):
        run(tmp_path, micro_batches=2)
    assert run(tmp_path).metrics == whole.metrics


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole, parts = (run(tmp_path / str(count), micro_batches=count, batch_size=8) for count in (1, 4))
    exact = exact_run(tmp_path / "exact", batch_size=8)
    assert_same_numbers(parts.metrics, whole.metrics, exact.metrics)


def test_clipping_bounds_the_gradient(tmp_path):
    model = make_model()
    run(tmp_path, model=model, steps=1, clip=1e-30, weight_decay=0.0, evaluation_interval=1)
    fresh = make_model()
    for (name, trained), start in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(trained, start, rtol=0.0, atol=1e-20, msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, poison):
    class Poisoned(type(make_task(1))):
        def loss(self, outputs, batch):
            self.calls = getattr(self, "calls", 0) + 1
            return super().loss(outputs, batch) * (poison if self.calls == 8 else 1.0)

    with pytest.raises(NonFiniteLossError, match=f"the training loss of standard is {poison} at step 7") as caught:
        run(tmp_path, task=lambda steps: Poisoned(TASK, total_steps=steps))
    assert (caught.value.step, caught.value.structure) == (7, "standard")
    assert (tmp_path / "checkpoints" / "step-00000006.ckpt").exists()
    assert not (tmp_path / "checkpoints" / "step-00000009.ckpt").exists()


def test_a_full_disk_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    replace, calls = os.replace, []

    def full_the_third_time(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(*args)

    monkeypatch.setattr(os, "replace", full_the_third_time)
    with pytest.raises(RunFolderError, match=r"step-00000009.ckpt: .* No space left on device"):
        run(tmp_path / "parts")
    monkeypatch.undo()
    assert reproducible(run(tmp_path / "parts").metrics) == reproducible(whole.metrics)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="the folder cannot be made"):
        run(tmp_path / "file" / "run")


def test_missing_metrics_are_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(
        RunFolderError, match=r"metrics.jsonl: expected at least the \d+ bytes of the checkpoint, got 0"
    ):
        run(tmp_path)


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of micro_batches 3, got 4"):
        run(tmp_path, micro_batches=3)


@pytest.mark.parametrize("budget", [{"tokens": 1000}, {"flops": 3e7}])
def test_budgets_are_spent(tmp_path, budget):
    result = run(tmp_path, steps=None, **budget)
    name, amount = next(iter(budget.items()))
    assert 0.8 * amount < getattr(result, name) <= amount


def test_a_budget_of_minutes_ends_in_time(tmp_path):
    result = run(tmp_path, steps=None, minutes=0.02, evaluation_interval=None)
    assert 1.2 <= result.seconds < 2.4
    rows = result.metrics
    again = run(tmp_path, steps=None, minutes=0.02, evaluation_interval=None)
    assert again.metrics == rows


def test_bfloat16_differs_a_little(tmp_path):
    exact, rounded = (run(tmp_path / name, precision=name) for name in ("float32", "bfloat16"))
    losses = [result.metrics[-1]["train_loss"] for result in (exact, rounded)]
    # Two roundings of the loss, as in assert_calibrated; here no plain computation errs.
    assert 0 < abs(losses[0] - losses[1]) <= 2 * torch.finfo(torch.bfloat16).eps * losses[0]


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
def test_auto_is_what_the_processor_is_made_for(monkeypatch, feature):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: False})
    assert [uses_bfloat16(name, cpu) for name in ("auto", "float32", "bfloat16")] == [False, False, True]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: True})
    assert [uses_bfloat16(name, cpu) for name in ("auto", "float32", "bfloat16")] == [True, False, True]


def test_a_compiled_model_leaves_the_same_checkpoint(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", steps=3, task=full_length)
    # Traced but not turned into machine code, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = run(tmp_path / "compiled", steps=3, compile=True, task=full_length)
    exact = exact_run(tmp_path / "exact", steps=3, config=FULL_LENGTH)
    assert_same_numbers(compiled.metrics, plain.metrics, exact.metrics)
    names = [
        restore_checkpoint(tmp_path / name / "checkpoints").state["model"].keys() for name in ("plain", "compiled")
    ]
    assert names[0] == names[1]


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path, trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "structattn"))
    events.Reload()
    logged = [event.value for event in events.Scalars("last_error")]
    assert logged == pytest.approx([row["last_error"] for row in result.metrics])


def test_a_setting_of_the_model_that_an_older_checkpoint_lacks_was_none(tmp_path):
    described = describe_run(TrainConfig(steps=12), make_model(), 1)
    assert described.pop("model.position_deviation") == "None"
    check_same_run(described, describe_run(TrainConfig(steps=12), make_model(), 1), tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with model.position_deviation = None, which .* = 0.1"):
        check_same_run(described, described | {"model.position_deviation": "0.1"}, tmp_path)
