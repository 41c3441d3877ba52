"""Two processes under torchrun, which exchange gradients through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from structattn.training import WALL_CLOCK, MetricsFile
from structattn.training.checkpoint import restore_checkpoint
from tests.training.tiny import assert_same_numbers, exact_run, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    # Where a process aborts, its stack stands in the message.
    debugging = {"PYTHONFAULTHANDLER": "1", "TORCH_SHOW_CPP_STACKTRACES": "1"}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | debugging
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--module", "tests.training.sharing", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder):
    return MetricsFile(folder / "metrics.jsonl").rows()


def test_two_processes_do_what_one_does(shared, tmp_path):
    alone, exact = run(tmp_path / "alone").metrics, exact_run(tmp_path / "exact").metrics
    together = rows(shared / "plain")
    assert_same_numbers(together, alone, exact)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["flops"] == theirs["flops"]


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
