"""The command line: its files, resumption, output and errors."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("transformers")

from structattn import versions
from structattn.cli import commands, main
from structattn.cli.task_options import TaskOptions, compare_options, train_options
from structattn.comparison.compare import Comparison
from structattn.comparison.run import ModelSizes
from structattn.retrofit.measure import Retrofit
from structattn.tasks import TASKS
from structattn.training import TrainConfig, loop
from structattn.training.update import Updater

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
TINY = ["--layers", "1", "--dim", "16", "--heads", "2", "--batch-size", "4"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


def _compare(text, out, *options, structures=("standard", "mlr", "swa:8"), steps="4"):
    command = ["compare", "language", "--attentions", *structures, "--data", str(text), "--context-length", "32"]
    return main([*command, *TINY, "--steps", steps, "--out", str(out), *options])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison, for tests that only read it."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRUCTATTN_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text(TEXT * 60)
        assert _compare(folder / "text.txt", folder / "out", "--seeds", "2") == 0
    return folder / "out"


def test_compare_writes_everything(compared):
    names = {path.name for path in compared.iterdir()}
    assert {"config.json", "environment.json", "results.json", "metrics.jsonl", "figures", "report.html"} <= names
    results = json.loads((compared / "results.json").read_text())
    assert [run["structure"] for run in results["runs"]] == ["standard", "mlr", "swa:8"] * 2
    assert all(run["final"]["step"] == 4 for run in results["runs"])
    lines = [json.loads(line) for line in (compared / "metrics.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines} == {0, 1}
    figures = {path.name for path in (compared / "figures").iterdir()}
    assert {"loss-flops.png", "loss-flops.svg", "loss-steps.png", "costs.png", "depth-maps.png"} <= figures
    page = (compared / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    assert "swa:8" in page


def test_a_second_run_trains_nothing(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert _compare(text, out) == 0
    first = json.loads((out / "results.json").read_text())
    capsys.readouterr()
    monkeypatch.setattr(loop._Run, "_step", lambda *_: pytest.fail("trained again"))
    assert _compare(text, out) == 0
    assert json.loads((out / "results.json").read_text()) == first
    assert "report.html" in capsys.readouterr().out


def test_another_config_is_refused_unless_overwritten(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert _compare(text, out, structures=["standard"]) == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "results.json").read_text()
    assert _compare(text, out, structures=["standard"], steps="5") == 1
    error = capsys.readouterr().err
    assert "train.steps was 4, is 5" in error
    assert "--overwrite" in error
    assert (out / "results.json").read_text() == before
    assert _compare(text, out, "--overwrite", structures=["standard"], steps="5") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "results.json").read_text())["runs"][0]["final"]["step"] == 5


def test_nan_loss_is_reported_and_the_others_go_on(text, tmp_path, capsys, monkeypatch):
    gradient = Updater.gradient

    def spoilt(updater, task, step):
        loss = gradient(updater, task, step)
        return loss * float("nan") if updater.model.config.attention == "mlr" and step == 2 else loss

    monkeypatch.setattr(Updater, "gradient", spoilt)
    out = tmp_path / "out"
    assert _compare(text, out) == 1
    error = capsys.readouterr().err
    assert "the training loss of mlr is nan at step 2" in error
    results = json.loads((out / "results.json").read_text())
    assert [run["error"] is None for run in results["runs"]] == [True, False, True]
    assert "at step 2" in (out / "report.html").read_text()


def test_equal_flops(text, tmp_path):
    out = tmp_path / "out"
    command = [
        "compare",
        "language",
        "--attentions",
        "standard",
        "swa:8",
        "--data",
        str(text),
        "--context-length",
        "32",
    ]
    assert main([*command, *TINY, "--flops", "3e8", "--out", str(out)]) == 0
    finals = [run["final"] for run in json.loads((out / "results.json").read_text())["runs"]]
    assert finals[0]["step"] < finals[1]["step"]
    assert all(0.8 * 3e8 < final["flops"] <= 3e8 for final in finals)


def test_the_authors_training_is_a_preset(text, tmp_path):
    out = tmp_path / "out"
    assert _compare(text, out, "--preset", "authors-256", structures=("mlr+paper",)) == 0
    run = json.loads(next((out / "runs").glob("*/run.json")).read_text())
    assert run["sizes"] == {
        "layers": 1,
        "dim": 16,
        "heads": 2,
        "positions": "learned",
        "token_deviation": 0.02,
        "position_deviation": 0.02,
    }
    wanted = {
        "schedule": "constant",
        "warmup": 0.02,
        "weight_decay": 0.0,
        "base_dim": 768,
        "epsilon": 1e-20,
        "steps": 4,
    }
    assert run["train"].items() >= wanted.items()
    assert "tokenizer" not in run["task"]  # the fixed table


def test_regression(tmp_path):
    out = tmp_path / "out"
    command = ["compare", "regression", "--input-dim", "4", "--attentions", "standard", "btt", "bmlr:4,2,2"]
    assert main([*command, *TINY, "--steps", "3", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["baselines"]["least squares"]["last_error"] < 1e-6
    assert len(results["runs"][1]["final"]["error_by_position"]) == 8
    assert (out / "figures" / "error-position.png").exists()


@pytest.fixture
def series(tmp_path):
    """A CSV file of 400 hours, with two channels of waves."""
    hours = np.arange(400)
    times = np.datetime64("2020-01-01T00:00") + hours * np.timedelta64(1, "h")
    waves = [np.sin(hours / 4), np.cos(hours / 7) + hours / 300]
    rows = [
        f"{str(time).replace('T', ' ')},{one:.4f},{other:.4f}" for time, one, other in zip(times, *waves, strict=True)
    ]
    path = tmp_path / "series.csv"
    path.write_text("\n".join(["date,load,OT", *rows, ""]))
    return path


def _forecast(series, out, *options, what="compare"):
    names = ["--attentions", "standard", "mlr:4,4"] if what == "compare" else ["--attention", "mlr:4,4"]
    data = ["--data", str(series), "--context", "24", "--horizon", "6", "--steps", "3", "--out", str(out)]
    return main([what, "forecast", *names, *TINY, *data, *options])


def test_forecast(series, tmp_path, capsys):
    out = tmp_path / "out"
    assert _forecast(series, out, "--seeds", "2") == 0
    assert "linear" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert set(results["baselines"]) == {"linear", "seasonal (24)", "last value"}
    final = results["runs"][0]["final"]
    assert {"mse", "test_mse", "test_target_mae_unit"} <= final.keys()
    assert [len(forecast) for forecast in final["test_forecasts"]] == [6, 6, 6]
    assert {path.name for path in (out / "figures").iterdir()} >= {
        "forecasts.png",
        "target-error.svg",
        "depth-maps.png",
    }
    assert main(["evaluate", "--run", str(out / "runs" / "standard-seed0")]) == 0
    assert f"{final['test_mse']:.4f} MSE of standardised values" in capsys.readouterr().out
    (out / "runs" / "standard-seed0" / "test.json").unlink()
    assert _forecast(series, out, "--seeds", "2") == 0
    assert json.loads((out / "results.json").read_text())["runs"][0]["final"] == final


def test_train_forecast_and_evaluate_on_another_series(series, tmp_path, capsys):
    out = tmp_path / "out"
    assert _forecast(series, out, "--positions", "rotary", "--target", "load", what="train") == 0
    other = tmp_path / "other.csv"
    other.write_text("".join(series.read_text().splitlines(keepends=True)[:301]))
    assert main(["evaluate", "--run", str(out), "--data", str(other)]) == 0
    wide = tmp_path / "wide.csv"
    wide.write_text("".join(f"{line},{line[-1]}\n" for line in series.read_text().splitlines()))
    assert main(["evaluate", "--run", str(out), "--data", str(wide)]) == 1
    assert "inputs must be (B, T, C)" in capsys.readouterr().err


BAD_SERIES = {
    "missing": ([], ("2020-01-01 07:00,0.9840,", "2020-01-01 07:00,NaN,"), "row 8, column 'load'; fill must choose"),
    "text": ([], ("2020-01-01 07:00,", "2020-01-01 07:00,x"), "row 8, column 'load': expected a finite number, got 'x"),
    "nowhere": (["--data", "ETTh3"], None, "got 'ETTh3': No such file"),
    "target": (["--target", "OTT"], None, "did you mean 'OT'"),
    "time": (["--time", "when"], None, "a column of series.csv must be one of date, load, OT, got 'when'"),
    "context": (["--context", "300"], None, "context 300 and horizon 6 need at least 306"),
    "horizon": (["--horizon", "50"], None, "the validation part"),
    "season": (["--season", "25"], None, "season must be at most the context of 24 steps, got 25"),
    "preset": (["--preset", "smal"], None, "did you mean 'small'"),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_bad_series_are_one_line_and_leave_nothing(series, tmp_path, capsys, name):
    options, change, message = BAD_SERIES[name]
    if change:
        series.write_text(series.read_text().replace(*change))
    out = tmp_path / "out"
    assert _forecast(series, out, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_train_evaluate_generate(text, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "language", "--attention", "mlr:4,4", "--data", str(text), "--context-length", "32"]
    assert main([*command, *TINY, "--steps", "3", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", str(out)]) == 0
    evaluated = capsys.readouterr().out
    final = json.loads((out / "results.json").read_text())["runs"][0]["final"]
    assert f"{final['nats_per_character']:.4f} nats per character" in evaluated
    run = out / "runs" / "mlr-4-4-seed0"
    texts = []
    for folder in (out, run, run):
        assert main(["generate", "--run", str(folder), "--prompt", "It was", "--length", "40"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("It was")
    assert len(texts[0]) == len("It was") + 40 + 1


def test_mup_check(tmp_path, capsys):
    quick = ["mup-check", "--attention", "standard", "--widths", "32", "64", "--steps", "2"]
    assert main([*quick, "--plot", str(tmp_path / "check.png")]) == 0
    assert "standard, muP: pass" in capsys.readouterr().out
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert main([*quick, "--mup", "off"]) == 1
    assert "standard parametrisation: fail" in capsys.readouterr().out
    assert main([*quick, "--plot", str(tmp_path / "none" / "check.png")]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["mup-check", "--widths", "64"]) == 1
    assert "widths must be at least two" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "tiled: eligible" in printed
    assert "paper-768" in printed
    assert re.search(r"transformers .*5\.17 to 5\.\d+", printed)
    outside = [line for line in printed.splitlines() if "than tested" in line or "too old" in line]
    assert all("torch " in line for line in outside)  # Which torch is installed is the caller's choice.


def test_info_marks_versions_that_were_not_tested(capsys, monkeypatch):
    known = {"transformers": "5.99.0", "numpy": "1.20.0", "tyro": None, "torch": "2.12.1"}
    monkeypatch.setattr(versions, "installed", lambda name: known.get(name, "2.0"))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"transformers .*5\.99\.0 .*newer than tested", printed)
    assert re.search(r"numpy .*1\.20\.0 .*too old: update it", printed)
    assert re.search(r"torch .*2\.12\.1 .*2\.13\.0 .*older than tested", printed)
    assert re.search(r"tyro .*not installed", printed)


def test_generate_wants_a_language_model_and_a_prompt(compared, tmp_path, capsys):
    assert main(["generate", "--run", str(compared), "--prompt", ""]) == 1
    assert "prompt must hold a character" in capsys.readouterr().err
    assert main(["generate", "--run", str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["generate", "--run", str(tmp_path)]) == 1
    assert "there is no run here" in capsys.readouterr().err


BAD = {
    "missing": (["--data", "nowhere.txt"], "nowhere.txt"),
    "empty": (["--data", "EMPTY"], "empty"),
    "binary": (["--data", "BINARY"], "is not text: NUL byte at byte offset 2"),
    "short": (["--data", "SHORT"], "context_length 32 needs at least 33"),
    "structure": (["--attentions", "standart"], "did you mean 'standard'"),
    "twice": (["--attentions", "mlr", "mlr"], "'mlr' twice"),
    "ranks": (["--attentions", "mlr:8,4"], "ranks must sum to the head width 8, got 8|4 = 12"),
    "preset": (["--preset", "dmo"], "did you mean 'demo'"),
    "two budgets": (["--train-tokens", "1e6"], "give one budget at most, got --steps and --train-tokens"),
    "tokenizer": (["--tokens", "byte"], "got 'byte'; did you mean 'bytes'?"),
    "folder without a tokenizer": (["--tokens", "/"], "tokenizer: the folder / holds no tokenizer"),
    "file that is no tokenizer": (["--tokens", "SHORT"], "SHORT cannot be read as a Hugging Face tokenizer: "),
    "heads": (["--heads", "3"], "heads must divide dim = 16"),
    "length": (["--context-length", "0"], "context_length must be a positive integer, got 0"),
    "batch": (["--batch-size", "0"], "batch_size must be a positive integer, got 0"),
    "rate": (["--learning-rate", "nan"], "learning_rate must be finite, got nan"),
    "seeds": (["--seeds", "0"], "seeds must be at least 1, got 0"),
    "window": (["--attentions", "swa:0"], "window must be a positive integer, got 0"),
    "file": (["--out", "FILE"], "the folder cannot be made"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(text, tmp_path, capsys, name):
    options, message = BAD[name]
    contents = {"EMPTY": b"", "BINARY": b"ab\0cd" * 100, "SHORT": b"too short", "FILE": b"in the way"}
    for word, content in contents.items():
        (tmp_path / word).write_bytes(content)
    options = [str(tmp_path / word) if word in contents else word for word in options]
    out = tmp_path / "out"
    assert _compare(text, out, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compair", "language"], "compare"),
        (["compare", "languages", "--out", "x"], "language"),
        (["compare", "language", "--out", "x", "--attention", "mlr"], "--attentions"),
        (["compare", "language"], "--out"),
    ],
)
def test_typos_are_answered(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["study", "width", "--jobs", "2"], "python -m paper width --jobs 2"),
        (["study"], "python -m paper"),
        (["chronos", "--out", "my runs"], "python -m paper chronos --out 'my runs'"),
    ],
)
def test_commands_of_the_paper_are_pointed_to(arguments, command, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.endswith(f"in a checkout, run `{command}`\n")
    assert error.count("\n") == 1


def test_disk_that_fills_keeps_what_was_written(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    interrupted = _compare(text, out, structures=["standard"], steps="4")
    assert interrupted == 0
    kept = (out / "results.json").read_text()
    replace = os.replace

    def full(source, target):
        if str(target).endswith("results.json"):
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert _compare(text, out, structures=["standard"], steps="4") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert (out / "results.json").read_text() == kept


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (TaskOptions, TrainConfig),
        (TaskOptions, ModelSizes),
        (TaskOptions, Comparison),
        *(
            (make(task, task.command), task.config)
            for task in TASKS.values()
            for make in (compare_options, train_options)
        ),
        (commands.Retrofit, Retrofit),
    ],
)
def test_options_agree_with_the_configs_that_they_set(options, config):
    """An option has the choices and the default of its field, or None for the preset's."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    shared = [option for option in dataclasses.fields(options) if option.name in fields]
    assert shared
    types, field_types = get_type_hints(options), get_type_hints(config)
    for option in shared:
        field = fields[option.name]
        if option.default not in (None, dataclasses.MISSING) and option.name not in ("ranks", "data"):
            assert option.default == field.default, option.name
        if choices := _choices(types[option.name]):
            known = _choices(field_types[option.name])
            assert known is None or choices == known or option.name == "mup", option.name


def _choices(kind):
    """The values of a Literal, alone or with None."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return next((set(get_args(each)) for each in get_args(kind) if get_origin(each) is Literal), None)


@pytest.mark.parametrize("words", [[], *([what, task] for what in ("compare", "train") for task in TASKS)])
def test_help_is_quick(words):
    """Help imports neither torch nor transformers, nor NumPy."""
    program = f"import sys; from structattn.cli import main\ntry: main([*{words}, '--help'])\nexcept SystemExit: pass\n"
    program += "print(*(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False False False"
    assert (words[-1] if words else "compare") in run.stdout


def test_version_is_known():
    run = subprocess.run([sys.executable, "-m", "structattn", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("structattn ")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["comprae"], ["structattn: no command 'comprae'; did you mean 'compare'?", "known are compare, train"]),
        (["compare", "langauge"], ["structattn compare: no command 'langauge'; did you mean 'language'?", "known are"]),
        (["train", "weather", "--data", "x"], ["structattn train: no command 'weather'", "known are language"]),
    ],
)
def test_a_misspelt_command_is_answered_in_three_lines(capsys, words, lines):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 3
    assert all(line.startswith(start) for line, start in zip(written, lines, strict=False))
    assert written[2].endswith("--help")


def test_generate_prints_its_text_alone(compared):
    """No library adds a notice, on standard output or standard error."""
    command = [sys.executable, "-m", "structattn", "generate", "--run", str(compared), "--prompt", "It was"]
    run = subprocess.run([*command, "--length", "40"], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout.startswith("It was")
    assert len(run.stdout.removesuffix("\n")) == len("It was") + 40
