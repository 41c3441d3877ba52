"""Two processes under torchrun, which exchange gradients by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from structattn.training import WALL_CLOCK, MetricsFile
from structattn.training.checkpoint import restore_checkpoint
from training.tiny import run

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(TESTS / "training" / "sharing.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder):
    return MetricsFile(folder / "metrics.jsonl").rows()


def test_two_processes_do_what_one_does(shared, tmp_path):
    alone = run(tmp_path).metrics
    together = rows(shared / "plain")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["flops"] == theirs["flops"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["error_by_position"] == pytest.approx(theirs["error_by_position"], rel=1e-3)


def test_two_processes_go_on_where_they_stopped(shared):
    whole, parts = (
        [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows(shared / name)]
        for name in ("whole", "parts")
    )
    assert json.dumps(parts) == json.dumps(whole)
    assert len(whole) == 4


def test_each_process_has_its_own_random_numbers(shared):
    state = restore_checkpoint(shared / "whole" / "checkpoints").state
    assert state is not None
    first, second = state["random"]
    assert not first["cpu"].equal(second["cpu"])


def test_another_number_of_processes_is_refused(shared):
    with pytest.raises(ValueError, match="holds a run with processes = 2, which cannot go on with processes = 1"):
        run(shared / "plain", micro_batches=2)
