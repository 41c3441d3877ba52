"""The Triton kernels on a CPU: `test_triton.py` once more, in a process whose Triton interprets; reasons to refuse."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from structattn import Hierarchy, mlr_attention
from structattn.ops import backends, triton
from structattn.ops.call import Call

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Shares of about equal time, so that processes of the suite can take them side by side.
SHARES = ["definition", "drawn or decode", "not definition and not drawn and not decode"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_battery_under_the_interpreter(share):
    command = [sys.executable, "-m", "pytest", "-q", "-k", share, "-p", "no:cacheprovider", "test_triton.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def call(width=8, value_width=8, dtype=torch.float32):
    query, value = torch.randn(1, 1, 4, width, dtype=dtype), torch.randn(1, 1, 4, value_width, dtype=dtype)
    return Call(query, query, value, None, None, None, None, Hierarchy.flat(width), True, 1.0, 0, 0.0)


def test_reasons(monkeypatch):
    status = {status.name: status for status in backends(call())}
    assert not status["triton"].eligible
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: "):
        mlr_attention(*[torch.randn(1, 1, 4, 8)] * 3, Hierarchy.flat(8), backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(triton.ineligible())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "float64" in str(triton.ineligible(call(dtype=torch.float64)))
    assert "CUDA devices, got cpu" in str(triton.ineligible(call()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.ineligible(call()) is None
    assert "1024 dimensions, got 1025" in str(triton.ineligible(call(width=1025)))
    assert "256 dimensions, got 300" in str(triton.ineligible(call(value_width=300)))
