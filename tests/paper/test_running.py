"""Trials run one by one, in processes or on a cluster; killed ones resume, and failed ones do not stop the others."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paper import running, workers
from paper.catalogue import STUDIES
from paper.cli import main
from paper.planning import duration, plan
from paper.running import has_ended, run_trials, unfinished
from paper.study import Trial
from paper.texts import TEXTS
from paper.workers import WorkerConfig
from structattn.comparison.run import ModelSizes, RunConfig
from structattn.tasks import RegressionConfig
from structattn.training import TrainConfig


def tiny(structure="standard", steps=6, seed=0, learning_rate=1e-3):
    train = TrainConfig(
        steps=steps, batch_size=4, learning_rate=learning_rate, precision="float32", evaluation_interval=3, seed=seed
    )
    config = RunConfig(structure, RegressionConfig(2), ModelSizes(1, 8, 2), train, seed)
    return Trial(config, {"structure": structure, "steps": steps})


ROOT = Path(__file__).parents[2]
TRIALS = [tiny("standard"), tiny("btt"), tiny("standard:1")]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the losses of running one by one in this process."""
    return [outcome.loss for outcome in run_trials(TRIALS, tmp_path_factory.mktemp("alone"))]


def test_a_run_that_was_cut_short_is_read_as_far_as_it_got(tmp_path):
    trial = TRIALS[0]
    assert unfinished(trial, tmp_path) is None
    run_trials([trial], tmp_path, runs=tmp_path)
    assert has_ended(trial, tmp_path)
    assert unfinished(trial, tmp_path) is None
    (tmp_path / trial.folder / "model" / "config.json").unlink()
    outcome = unfinished(trial, tmp_path)
    assert outcome is not None
    assert outcome.labels == trial.all_labels | {"unfinished": "yes"}
    assert [row["step"] for row in outcome.rows] == [3, 6]


def test_one_table_row_for_each_trial(tmp_path, alone):
    followed = []
    outcomes = run_trials(TRIALS, tmp_path, on_outcome=lambda outcome, ended, count: followed.append((ended, count)))
    assert [outcome.loss for outcome in outcomes] == alone
    assert followed == [(1, 3), (2, 3), (3, 3)]
    rows = table(tmp_path)
    assert [row["structure"] for row in rows] == ["standard", "btt", "standard:1"]
    assert [float(row["loss"]) for row in rows] == alone
    assert all(int(row["parameters"]) > 0 and float(row["flops"]) > 0 for row in rows)


def test_two_workers(tmp_path, alone):
    outcomes = run_trials(TRIALS[:2], tmp_path, workers=WorkerConfig(2))
    assert [outcome.loss for outcome in outcomes] == alone[:2]
    assert [outcome.labels["structure"] for outcome in outcomes] == ["standard", "btt"]


def test_a_launcher_of_clusters(tmp_path, alone, monkeypatch):
    """Submitit also starts local processes through the same interface."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(workers.SlurmWorkers, "engine", "local")
    outcomes = run_trials(TRIALS[:2], tmp_path, workers=WorkerConfig(2, "slurm"))
    assert [outcome.loss for outcome in outcomes] == alone[:2]


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm here")
def test_without_slurm_it_says_so(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="needs the command sbatch"):
        run_trials(TRIALS[:1], tmp_path, workers=WorkerConfig(launcher="slurm"))


def test_what_is_done_is_read(tmp_path, monkeypatch, alone):
    run_trials(TRIALS, tmp_path)
    monkeypatch.setattr("structattn.training.loop._Run._step", None)  # a step would fail
    assert [each.loss for each in run_trials(TRIALS, tmp_path)] == alone


def test_studies_share_runs(tmp_path, monkeypatch, alone):
    """A study reads the runs of another; a run with the same labels and another config is another run."""
    run_trials(TRIALS, tmp_path / "first", runs=tmp_path / "runs")
    monkeypatch.setattr("structattn.training.loop._Run._step", None)  # a step would fail
    again = run_trials(TRIALS[1:], tmp_path / "second", runs=tmp_path / "runs")
    assert [each.loss for each in again] == alone[1:]
    assert len(table(tmp_path / "second")) == 2
    other = Trial(tiny("standard", learning_rate=2e-3).config, TRIALS[0].labels)
    assert other.name == TRIALS[0].name
    assert run_trials([other], tmp_path / "third", runs=tmp_path / "runs")[0].error is not None


def test_two_processes_at_one_run(tmp_path, alone):
    """The second process waits, and both report the same."""
    outcomes = run_trials([TRIALS[0], TRIALS[0]], tmp_path, workers=WorkerConfig(2))
    assert [outcome.loss for outcome in outcomes] == [alone[0]] * 2
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_failed_trial_is_reported_and_the_others_run(tmp_path, alone):
    trials = [tiny("standard", learning_rate=1e18, steps=7), tiny("standard:3"), TRIALS[1]]
    outcomes = run_trials(trials, tmp_path)
    assert outcomes[0].error == "the training loss of standard is inf at step 1; a lower learning rate may help"
    assert outcomes[1].error == "ValueError: heads must divide dim = 8 unless head_dim is given, got 3"
    assert outcomes[2].loss == alone[1]
    rows = table(tmp_path)
    assert rows[1]["failed"] == outcomes[1].error
    assert rows[2]["failed"] == ""


def test_a_worker_that_dies_is_a_failed_trial():
    with workers.ProcessWorkers(1) as pool:
        future = pool.submit(signal.raise_signal, signal.SIGKILL)
        outcome = running._outcome(future, TRIALS[0])
    assert outcome.error == "the worker died: exit status -9"
    assert outcome.labels["structure"] == "standard"


def test_a_killed_study_goes_on(tmp_path, alone):
    """A study killed between its first and last trial resumes."""
    script = (
        "import sys; from pathlib import Path; from tests.paper.test_running import TRIALS, run_trials;"
        "run_trials(TRIALS, Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment)
    while process.poll() is None and not (tmp_path / "results.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = len(table(tmp_path))
    assert ended >= 1
    assert [each.loss for each in run_trials(TRIALS, tmp_path)] == alone
    assert len(table(tmp_path)) == 3


def test_plan():
    plans = plan([tiny("standard"), tiny("standard", seed=1), tiny("btt", steps=12)])
    assert [each.cost.steps for each in plans] == [6, 6, 12]
    assert plans[0].cost.seconds == plans[1].cost.seconds > 0
    assert plans[2].cost.flops > plans[0].cost.flops == plans[1].cost.flops
    assert [duration(each) for each in (5, 300, 7200, 1e6)] == ["5 s", "5 min", "2.0 h", "12 days"]


class TestCommand:
    def test_dry_run(self, tmp_path, capsys):
        assert main(["width", "--dry-run", "--seeds", "1", "--out", str(tmp_path / "none")]) == 0
        printed = capsys.readouterr().out
        assert "9 runs, 1 at a time" in printed
        assert not (tmp_path / "none").exists()

    def test_run(self, tmp_path, capsys, monkeypatch):
        trials = [
            Trial(trial.config, {"structure": trial.labels["structure"], "width": 8, "head_rank": 4, "input_dim": 2})
            for trial in TRIALS
        ]
        monkeypatch.setattr(type(STUDIES["width"]), "trials", lambda *_: trials)
        assert main(["width", "--out", str(tmp_path)]) == 0
        assert "standard:1 0." in capsys.readouterr().out
        assert (tmp_path / "report.html").exists()
        assert (tmp_path / "width" / "README.md").exists()
        command = json.loads((tmp_path / "width" / "finding.json").read_text())["command"]
        assert command == ["python", "-m", "paper", "width", "--out", str(tmp_path)]

    def test_a_failed_run_ends_with_status_1(self, tmp_path, capsys, monkeypatch):
        labels = {"structure": "standard:3", "width": 8, "head_rank": 4, "input_dim": 2}
        trials = [Trial(tiny("standard:3").config, labels)]
        monkeypatch.setattr(type(STUDIES["width"]), "trials", lambda *_: trials)
        assert main(["width", "--out", str(tmp_path)]) == 1
        assert "paper: structure standard:3, width 8" in capsys.readouterr().err

    def test_debug_shows_where_an_error_came_from(self, tmp_path, capsys):
        assert main(["width", "--seeds", "0", "--debug", "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.endswith("paper: seeds must be a positive integer, got 0\n")

    def test_every_study_has_a_text(self):
        assert list(TEXTS) == list(STUDIES)

    @pytest.mark.parametrize("name", STUDIES)
    def test_the_subcommand_names_its_study(self, name, monkeypatch):
        asked = []
        monkeypatch.setattr("paper.actions.perform", lambda command, line: asked.append(command.name) or 0)
        assert main([name]) == 0
        assert asked == [name]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "Missing subcommand"),
            (["width", "--preset", "smal"], "--preset"),
            (["width", "--sedes", "1"], "--seeds"),
            (["chronos"], "--out"),
        ],
    )
    def test_typos_are_answered(self, arguments, said, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code != 0
        assert said in capsys.readouterr().err

    def test_help_is_quick(self):
        """Help imports neither torch nor transformers."""
        program = "import sys; from paper.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        program += "print('torch' in sys.modules, 'transformers' in sys.modules)"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert run.stdout.splitlines()[-1] == "False False"
        assert all(name in run.stdout for name in [*STUDIES, "chronos"])

    def test_in_a_checkout(self):
        command = [sys.executable, "-m", "paper", "widht"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert run.returncode == 2
        assert run.stderr.startswith("python -m paper: no command 'widht'; did you mean 'width'?\n")
        assert run.stderr.count("\n") == 3

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["width", "--seeds", "0"], "seeds must be a positive integer, got 0"),
            (["width", "--jobs", "0"], "jobs must be a positive integer, got 0"),
            (["width", "--data", "novels"], "the study width draws its own, got --data novels"),
            (["scaling", "--data", "missing.txt"], "missing.txt"),
            (["forecast", "--data", "missing.csv"], "missing.csv"),
        ],
    )
    def test_bad_input(self, tmp_path, capsys, options, said):
        assert main([*options, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
