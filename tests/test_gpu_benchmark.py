"""The parts of the GPU benchmark that a CPU can run: cases, check of results, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import attention as gpu

ROOT = Path(__file__).parent.parent


def test_cases_cover_what_is_promised():
    assert {(case.operation, case.rank) for case in gpu.CASES} == {
        (operation, rank) for operation in ("forward", "forward + backward", "decode") for rank in (64, 128)
    }
    assert {case.length for case in gpu.CASES} == {1024 * 2**power for power in range(7)}
    for case in gpu.CASES:
        assert all(gpu.hierarchy(case, variant).rank == case.rank for variant in case.variants)
        assert gpu.work(case, "8x8") < gpu.work(case, "P32") < gpu.work(case, "flat") == gpu.work(case, "SDPA flash")


@pytest.mark.parametrize("operation", ["forward", "forward + backward"])
def test_results_are_checked(operation):
    case = gpu.Case(operation, 128, 64)
    result = gpu.build(case, "P32", "cpu")()
    assert "reason" not in gpu.check_variant(case, result, "P32", "cpu")
    assert gpu.check_variant(case, result, "flat", "cpu")["reason"].startswith("wrong by")


def test_measures_and_renders(tmp_path):
    rows = gpu.measure(gpu.Case("decode", 512, 128), 0.01, "cpu")
    timed = {row["variant"] for row in rows if "samples_ms" in row}
    assert timed >= {"P32", "8x8", "flat"}
    facts = {"card": "none", "capability": "0.0", "memory_gb": 1.0, "torch": "2", "cuda": "1", "triton": "3"}
    facts |= {"commit": "0" * 40, "time": "now", "roof": {"bfloat16": 1e12}, "rows": rows}
    path = tmp_path / "attention-gpu.json"
    path.write_text(json.dumps(facts))
    gpu.report.render(path)
    table = path.with_suffix(".md").read_text()
    assert "| T | SDPA flash | SDPA cuDNN | P32 | 8x8 | flat |" in table
    assert "## Decode, r = dv = 128" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
