"""The study of Chronos: two tiny models from the command to figure and table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

for module in ("chronos", "gluonts", "sklearn"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from paper.chronos.attention import COMPARED, spelling  # noqa: E402
from paper.chronos.data import RealSeries  # noqa: E402
from paper.chronos.figure import chronos_markdown  # noqa: E402
from paper.chronos.run import ChronosRunConfig, chronos_training  # noqa: E402
from paper.chronos.study import ChronosResults, ChronosStudy, measure_chronos  # noqa: E402
from paper.chronos.task import ChronosDataConfig  # noqa: E402
from paper.chronos.verdict import chronos_verdict, flops_to_reach  # noqa: E402
from paper.cli import main  # noqa: E402
from paper.planning import plan  # noqa: E402
from paper.running import run_trial  # noqa: E402
from paper.study import Trial  # noqa: E402
from structattn.integrations.chronos import load_chronos  # noqa: E402
from structattn.training import RunFolderError, TrainConfig  # noqa: E402
from tests.tasks.series_files import frame, write  # noqa: E402

OPTIONS = ["--context-length", "64", "--horizon", "4", "--n-tokens", "32", "--steps", "4", "--batch-size", "4"]
OPTIONS += [
    "--compositions",
    "2",
    "--evaluation-series",
    "4",
    "--samples",
    "2",
    "--attentions",
    *COMPARED[:2],
    "--precision",
    "bfloat16",
    "--series",
]


SMALL = ChronosRunConfig(
    context_length=64, prediction_length=4, n_tokens=32, data=ChronosDataConfig(2, 8, 128, evaluation_series=2)
)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.csv"
    rows = [f"2020-01-{t // 24 + 1:02d} {t % 24:02d}:00:00,{np.sin(t / 4):.4f},{t % 7}" for t in range(400)]
    path.write_text("\n".join(["date,a,b", *rows]))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, series):
    out = tmp_path_factory.mktemp("study") / "out"
    assert main(["chronos", "--out", str(out), *OPTIONS, str(series)]) == 0
    return out


def test_the_command_writes_what_it_found(folder):
    results = ChronosResults.load(folder)
    assert [run.attention for run in results.runs] == ["standard", "mlr:16|16"]
    standard, mlr = results.runs
    assert [point[0] for point in standard.curve] == [4 * 4 * 70 * k for k in (1 / 4, 1 / 2, 3 / 4, 1)]
    assert [point[0] for point in mlr.curve] == [point[0] for point in standard.curve]
    assert mlr.curve[-1][1] < standard.curve[-1][1]
    assert set(standard.metrics) == {"synthetic", "waves"} == set(results.baselines)
    assert results.judged == {"synthetic": [4, 0], "waves": [32, 0]}
    assert set(results.baselines["waves"]) == {"last value", "seasonal naive (24)"}
    assert (folder / "loss-flops.png").stat().st_size > 10_000
    lines = chronos_markdown(results).splitlines()
    assert len(lines) == 2 + 2 + 2
    assert len({line.count(" | ") for line in lines}) == 1
    assert f"{standard.loss:.4f}" in lines[2]
    assert results.verdict.startswith("Nats per token at the end: standard ")
    assert (folder / "table.md").read_text().splitlines() == lines
    assert results.study["run"]["train"]["precision"] == "bfloat16"
    assert load_chronos(folder / "runs" / "standard-seed0" / "model").model_context_length == 64


def test_called_again_it_reads_what_is_there(folder, series, monkeypatch):
    before = json.loads((folder / "results.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr("structattn.integrations.chronos.forecast", None)
        assert main(["chronos", "--out", str(folder), *OPTIONS, str(series)]) == 0
    assert json.loads((folder / "results.json").read_text()) == before


def test_another_study_is_not_mixed_in(folder):
    other = dataclasses.replace(SMALL, data=ChronosDataConfig(evaluation_series=2))
    with pytest.raises(RunFolderError, match="another config"):
        measure_chronos(ChronosStudy(run=other), folder)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path, series):
    far = dataclasses.replace(SMALL, prediction_length=90, data=ChronosDataConfig(2, evaluation_series=2))
    with pytest.raises(ValueError, match="head width 32"):
        measure_chronos(ChronosStudy((spelling("standard"), spelling("mlr:16|8")), SMALL), tmp_path / "out")
    with pytest.raises(ValueError, match="shorter than a forecast"):
        measure_chronos(ChronosStudy(run=far, series=RealSeries(str(series))), tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
    with pytest.raises(ValueError, match="train must have a budget of steps or tokens"):
        ChronosRunConfig(train=TrainConfig(minutes=1.0))
    with pytest.raises(ValueError, match="attentions must name at least one"):
        ChronosStudy(())
    with pytest.raises(ValueError, match="attentions must differ, got 'standard' twice"):
        ChronosStudy(tuple(map(spelling, ("standard", "mlr", "standard"))))
    with pytest.raises(ValueError, match="season must be below the context of 64 steps, got 64"):
        measure_chronos(ChronosStudy(run=SMALL, series=RealSeries(str(series), season=64)), tmp_path / "out")


def test_compute_to_reach_a_loss():
    curve = [(10.0, 5.0), (20.0, 4.0), (30.0, 4.5), (40.0, 3.0)]
    assert flops_to_reach(curve, 6.0) == 10.0
    assert flops_to_reach(curve, 4.25) == 17.5
    assert flops_to_reach(curve, 3.75) == 35.0
    assert flops_to_reach(curve, 2.0) == np.inf


def test_the_verdict_compares_seed_by_seed():
    def curves(**ends):
        return {
            (name, seed): [(10.0, 6.0), (110.0, loss)]
            for name, losses in ends.items()
            for seed, loss in enumerate(losses)
        }

    words, saves = chronos_verdict(curves(standard=[4.0, 5.0], mlr=[3.0, 4.0]))
    assert "mlr 3.500 ± 0.500, at standard's loss after 62 ± 8% of standard's FLOPs" in words
    assert saves == [None]  # Two seeds: shares of 70% and 55%, whose interval is wide.
    words, saves = chronos_verdict(curves(standard=[4.0] * 3, mlr=[2.0, 2.01, 1.99], other=[5.0] * 3, third=[3, 5, 5]))
    assert saves == [True, False, None]
    assert "other 5.000 ± 0.000, at standard's loss with 0 of 3 seeds" in words
    assert "third 4.333 ± 0.667, at standard's loss with 1 of 3 seeds" in words
    assert chronos_verdict(curves(mlr=[2.0])) == ("", [])


def test_series_that_cannot_be_judged_are_left_out(tmp_path):
    """Windows with a constant past or a filled future are dropped and counted."""
    made = frame(600).astype(object)
    made.loc[480:560, "south"] = 7
    made.loc[562:575, "OT"] = ""
    every = RealSeries(write(tmp_path, made), fill="forward", season=6).windows(40, 5)
    usable = every.usable()
    assert len(every.past) == 3 * 16
    assert usable.left_out == 48 - len(usable.past)
    places = {"south": every.past[1::3], "OT": every.future[2::3]}
    still = (places["south"][:, 6:] == places["south"][:, :-6]).all(axis=1)
    unseen = np.isnan(places["OT"]).any(axis=1)
    assert usable.left_out == still.sum() + unseen.sum()
    assert still.any()
    assert unseen.any()
    assert usable.judge(np.repeat(usable.past[:, None, -5:], 2, axis=1))["mase"] > 0
    made["OT"] = made["south"] = made["north"] = 1
    with pytest.raises(ValueError, match=r"none of 48 windows can be judged: .* repeats itself after 6 steps"):
        RealSeries(write(tmp_path, made), season=6).windows(40, 5).usable()


def test_overwrite_deletes_nothing_before_the_new_study_is_known_to_fit(folder, tmp_path):
    before = sorted(path.name for path in folder.rglob("*"))
    path = write(tmp_path, frame(400).assign(north=1, south=1, OT=1))
    assert main(["chronos", "--out", str(folder), "--overwrite", *OPTIONS, path]) == 1
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_loss_that_is_not_finite_ends_the_study(tmp_path):
    run = dataclasses.replace(SMALL, train=chronos_training(4, learning_rate=1e18))
    with pytest.raises(RunFolderError, match=r"training loss of standard\+qk_norm=false\+scale=1 is"):
        measure_chronos(ChronosStudy((COMPARED[0],), run), tmp_path / "out")


def test_a_study_runs_it_too(tmp_path):
    """It is a trial of `python -m paper forecast`, too."""
    run = dataclasses.replace(SMALL, train=chronos_training(4, batch_size=4))
    trial = Trial(run, {"part": "Chronos", "structure": "standard", "size": "reduced"})
    (planned,) = plan([trial])
    outcome = run_trial(trial, tmp_path)
    assert outcome.error is None
    assert (planned.cost.parameters, planned.cost.steps, planned.cost.flops) == (outcome.parameters, 4, outcome.flops)
    assert outcome.loss == outcome.rows[-1]["nats_per_token"]
    assert [row["step"] for row in outcome.rows] == [1, 2, 3, 4]
