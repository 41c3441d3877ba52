"""The retrofit study: measurements, resumption, figure, table and command."""

import dataclasses
import json

import pytest
import torch

from structattn.cli import main
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.retrofit.measure import Measurement, Retrofit, RetrofitResults, measure_retrofit
from structattn.retrofit.report import draw_retrofit, retrofit_markdown, retrofit_verdict
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.training import RunFolderError, TrainConfig, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model, trained for 60 steps, and its text."""
    folder = tmp_path_factory.mktemp("retrofit")
    text = folder / "text.txt"
    text.write_text("The cat sat on the mat. The dog ran to the door; the cat slept.\n" * 120)
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(layers=2, dim=16, heads=2, context_length=32, positions="rotary"))
    task = LanguageTask(LanguageConfig(str(text), 32, 256))
    train(model, lambda steps: task, TrainConfig(steps=60, batch_size=8), folder / "training")
    model.save_pretrained(folder / "model")
    return folder / "model", str(text)


def study_of(trained, **fields):
    options = {"ranks": ((8,), (4, 4), (2, 6)), "tune_steps": 3, "batch_size": 4, "evaluation_tokens": 256}
    return Retrofit(*trained, **options | {"calibration_tokens": 512} | fields)


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return measure_retrofit(study_of(trained), folder), folder


def test_rows(measured):
    results, _ = measured
    assert [row.name for row in results.rows] == [
        "standard",
        "8, measured order",
        "8, trained order",
        "4|4, measured order",
        "4|4, trained order",
        "2|6, measured order",
        "2|6, trained order",
    ]
    standard = results.standard
    for row in results.rows[1:3]:  # one level is the model itself, up to rounding in its new basis
        assert row.loss == pytest.approx(standard.loss, abs=1e-5)
        assert row.key_numbers_per_token == standard.key_numbers_per_token
    for row in results.rows[3:]:
        assert row.loss != pytest.approx(standard.loss, abs=1e-6)
        assert row.key_numbers_per_token < standard.key_numbers_per_token
        assert row.score_flops_per_token < standard.score_flops_per_token
    assert all(row.tuned_loss != row.loss for row in results.rows)


def test_the_model_states_the_costs(trained, measured):
    model = LanguageModel.from_pretrained(trained[0])
    assert measured[0].standard.key_numbers_per_token == model.key_numbers(32) / 32
    assert measured[0].standard.flops_per_token == model.flops(32).forward / 32


def test_resumption(trained, measured, tmp_path):
    results, folder = measured
    some = dataclasses.replace(results, rows=results.rows[:4])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    some.save(tmp_path)
    again = measure_retrofit(study_of(trained), tmp_path)
    assert again == results == RetrofitResults.load(tmp_path) == measure_retrofit(study_of(trained), tmp_path)
    assert not (tmp_path / "tuned" / "6").exists()


def test_another_study_in_the_folder(trained, measured):
    with pytest.raises(RunFolderError, match="tune_steps was 3, is 4"):
        measure_retrofit(study_of(trained, tune_steps=4), measured[1])


def test_overwriting_another_study_drops_its_unfinished_tuning(trained, tmp_path):
    model = LanguageModel.from_pretrained(trained[0])
    task = LanguageTask(LanguageConfig(trained[1], 32, 256))
    other = TrainConfig(steps=2, batch_size=2, evaluation_interval=1)
    train(model, lambda steps: task, other, tmp_path / "tuned" / "0")
    study = study_of(trained, ranks=((4, 4),), tune_steps=1)
    with pytest.raises(ValueError, match="batch_size = 2, which cannot go on"):
        measure_retrofit(study, tmp_path)
    assert len(measure_retrofit(study, tmp_path, overwrite=True).rows) == 3
    assert not list((tmp_path / "tuned").iterdir())


def test_picture_and_table(measured, tmp_path):
    results, _ = measured
    draw_retrofit([results, results], tmp_path)
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "retrofit.svg").stat().st_size > 1000
    lines = retrofit_markdown(results).splitlines()
    assert len(lines) == 2 + 7
    assert lines[5].startswith("| 4,4 | measured | ")


def test_verdict():
    def row(order, loss, keys):
        return Measurement((4, 4), order, loss, None, keys, 1.0, 1.0)

    results = RetrofitResults("rotary", 32, "text", 0, (row(None, 1.0, 100.0), row("measured", 1.009, 30.0)))
    assert retrofit_verdict(results).startswith("4|4, measured order keeps 30% of the key numbers at 32 tokens")
    assert "1.0090 against 1.0000, +0.9%" in retrofit_verdict(results)
    assert "No split" in retrofit_verdict(results, tolerance=0.005)


def test_command(trained, tmp_path, capsys):
    model, text = trained
    out = tmp_path / "out"
    command = ["retrofit", "--model", str(model), "--data", text, "--out", str(out), "--batch-size", "4"]
    assert main([*command, "--ranks", "4,4", "4x2", "--tune-steps", "0"]) == 1
    assert "holds" not in (error := capsys.readouterr().err)
    assert "twice" in error
    assert main([*command, "--ranks", "4,4", "--tune-steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "4|4" in printed
    assert "4|4, measured order keeps 75% of the key numbers at 32 tokens" in printed
    assert json.loads((out / "results.json").read_text())["rows"][0]["tuned_loss"] is None
    assert (out / "retrofit.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "4,2"], "ranks must sum to the head width 8, got 4|2 = 6"),
        (["--ranks", "5,3"], "even level ranks"),
        (["--ranks", "a"], "expected a positive integer, got 'a'"),
        (["--model", "nowhere"], "there is no such folder"),
        (["--tune-steps", "-1"], "tune_steps must be at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, options, message):
    model, text = trained
    base = ["retrofit", "--model", str(model), "--data", text, "--out", str(tmp_path / "out"), "--ranks", "4,4"]
    assert main([*base, *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mlr_models_have_levels_already(tmp_path, trained, capsys):
    sizes = {"layers": 1, "dim": 16, "heads": 2, "context_length": 32}
    LanguageModel(LanguageModelConfig(**sizes, attention="mlr:4,4")).save_pretrained(tmp_path / "model")
    command = ["retrofit", "--model", str(tmp_path / "model"), "--data", trained[1], "--out", str(tmp_path / "out")]
    assert main([*command, "--ranks", "4,4"]) == 1
    assert "only standard attention can be retrofitted, got MLRAttention" in capsys.readouterr().err
