"""The parts of the GPU benchmark, rehearsed on the CPU as their users call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for needed in ("triton", "transformers", "accelerate", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


def command(*words):
    return [sys.executable, "-m", "benchmarks.gpu", *words]


def environment():
    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}


def call(*words):
    return subprocess.run(command(*words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580)


def document_of(folder, part):
    return json.loads((folder / f"gpu-{part}.json").read_text())


PARTS = ("correctness", "timings", "training", "language")


def test_without_a_card_it_says_so(tmp_path):
    done = call(*PARTS, "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rehearsal_runs_every_case_of_every_part(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 1000)
    options = ["--case-seconds", "0.001", "--processes", "1", "--scratch", str(tmp_path / "runs"), "--data", str(text)]
    done = call(*PARTS, "--rehearse", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for part in PARTS:
        document = document_of(tmp_path, part)
        assert document["finished"]
        assert (document["failed"], document["not_run"]) == ([], [])
        assert "A rehearsal on the CPU" in (tmp_path / f"gpu-{part}.md").read_text()
        for row in document["rows"]:
            assert "cuDNN" in row.get("variant", "") or "reason" not in row


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_its_rows(tmp_path):
    running = subprocess.Popen(
        command("correctness", "--rehearse", "--out", str(tmp_path), "--processes", "1"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "one level" in running.stdout.readline()
    running.kill()
    running.wait(20)
    running.stdout.close()
    time.sleep(0.1)
    document = document_of(tmp_path, "correctness")
    assert [row["case"] for row in document["rows"]] == ["one level"]
    assert not document["finished"]


@pytest.mark.slow
def test_a_wrong_kernel_is_reported_with_its_inputs(tmp_path):
    """A sitecustomize halves what the kernels return, in the processes that check them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import structattn.ops.triton as kernels\n"
        "right = kernels.decode\n"
        "kernels.decode = lambda call: right(call) / 2\n"
    )
    wrong = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}:{ROOT}"}
    words = command("correctness", "--rehearse", "--out", str(tmp_path), "--processes", "1", "--only", "decode")
    done = subprocess.run(words, cwd=ROOT, env=wrong, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "failed: correctness" in done.stderr
    row = document_of(tmp_path, "correctness")["rows"][0]
    assert row["reason"].startswith("output: error ")
    assert "32|32|64v@w*|1024|256" in row["inputs"]
    assert "## What failed" in (tmp_path / "gpu-correctness.md").read_text()
