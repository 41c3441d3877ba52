"""A run killed with SIGKILL at any moment resumes to the same metrics, to the bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from structattn.training import WALL_CLOCK, MetricsFile
from tests.training.killing import MOMENTS

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of the runs, and the exit statuses of their processes."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.killing", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "statuses.json").read_text())


def metrics(folder):
    rows = MetricsFile(folder / "metrics.jsonl").rows()
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


@pytest.mark.parametrize("moment", [moment.__name__ for moment in MOMENTS])
def test_killed_at_a_moment(runs, moment):
    folder, statuses = runs
    assert statuses["whole"] == [0]
    assert statuses[moment] == [KILLED, 0]
    whole = metrics(folder / "whole")
    assert len(whole) == 8
    assert metrics(folder / moment) == whole
    assert len(list((folder / moment / "checkpoints").glob("*.ckpt"))) == 2


def test_killed_again_and_again_at_random(runs):
    folder, statuses = runs
    assert statuses["at_random"][-1] == 0
    assert statuses["at_random"].count(KILLED) >= 1
    assert metrics(folder / "at_random") == metrics(folder / "long")
