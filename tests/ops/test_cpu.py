"""The compiled backend beside the common battery: its build, what it falls back to, threads, forks, other machines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from structattn import Hierarchy, mlr_attention
from structattn.ops import backends, cpu
from structattn.ops.call import Call
from structattn.ops.cpu import library, prebuilt
from tests.ops import core

needs_kernel = pytest.mark.skipif(library.failure() is not None, reason=f"no kernel: {library.failure()}")
DEEP = Hierarchy((6, 4, 2, 2), (None, 64, 32, 8), "mean")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter: the library is loaded once per process."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def tensors(length: int = 150, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 2, length, DEEP.rank, generator=generator).to(dtype) for _ in range(3))


# --- eligibility ------------------------------------------------------------------------------------------------------


@needs_kernel
def test_auto_takes_the_kernel_for_the_dtypes_it_serves():
    status = {dtype: backends(_call(dtype))[0] for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    assert status[torch.float32].name == "cpu"
    assert status[torch.float32].eligible
    assert status[torch.bfloat16].eligible
    assert "float64" in str(status[torch.float64])


def _call(dtype: torch.dtype, device: str = "cpu") -> Call:
    query, key, value = (tensor.to(device) for tensor in tensors(dtype=dtype))
    return Call(query, key, value, None, None, None, None, DEEP, True, 1.0, 0, 0.0)


def test_meta_tensors_are_not_served():
    assert "meta" in str(cpu.ineligible(_call(torch.float32, "meta")))


# --- the build --------------------------------------------------------------------------------------------------------

FALLBACK = """
import warnings, torch
from structattn import Hierarchy, mlr_attention
from structattn.ops import backends
query = torch.randn(1, 1, 9, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outs = [mlr_attention(query, query, query, Hierarchy.flat(4)) for _ in range(2)]
assert torch.equal(outs[0], mlr_attention(query, query, query, Hierarchy.flat(4), backend="tiled"))
print(len(caught), caught[0].message, backends()[0])
try:
    mlr_attention(query, query, query, Hierarchy.flat(4), backend="cpu")
except ValueError as error:
    print("refused:", error)
"""


def test_without_a_compiler_tiled_serves_with_one_warning(tmp_path):
    result = python(FALLBACK, CXX="no-such-compiler", STRUCTATTN_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 ")
    assert result.stdout.count("no C++ compiler: no-such-compiler is not on PATH") == 3
    assert "refused: backend 'cpu'" in result.stdout


@needs_kernel
def test_a_failed_build_shows_the_compilers_last_lines(tmp_path):
    flags = "-DSTRUCTATTN_NO_SUCH -include no_such_header.h"
    result = python(FALLBACK, STRUCTATTN_CXXFLAGS=flags, STRUCTATTN_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "no_such_header.h" in result.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_import_builds_nothing(tmp_path):
    result = python("import structattn.ops", STRUCTATTN_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


@needs_kernel
@pytest.mark.slow
def test_processes_that_start_at_once_compile_once(tmp_path):
    code = "from structattn.ops.cpu import library; library.load()"
    environment = os.environ | {"STRUCTATTN_CACHE": str(tmp_path), "STRUCTATTN_CXXFLAGS": "-O0"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".so", ".lock")]


# --- other machines ---------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512"])
def test_kernel_for_lesser_machines(target):
    """The instruction sets that this machine runs besides its own, forced one by one."""
    if os.uname().machine != "x86_64":
        pytest.skip("instruction sets of x86-64")
    needed = {"haswell": "avx2", "skylake-avx512": "avx512"}.get(target)
    if needed and not prebuilt.NEEDS[needed] <= prebuilt.instructions():
        pytest.skip(f"this machine lacks {needed}")
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    # Without fused multiply-adds sums are rounded more often than plain PyTorch's: fewer cases meet the tolerance.
    cases = core.NARROW if target == "x86-64" else ()
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.ops.core", *cases]
    environment = {"STRUCTATTN_CXXFLAGS": f"-march={target}", "STRUCTATTN_KERNEL": "source", "PYTHONPATH": path}
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# --- threads and forks ------------------------------------------------------------------------------------------------


@needs_kernel
def test_concurrent_calls_give_what_single_calls_give():
    lengths = [70, 150, 333, 64]
    expected = [_forward_backward(length) for length in lengths]
    failures = []

    def work(index: int) -> None:
        for _ in range(10):
            for actual, wanted in zip(_forward_backward(lengths[index]), expected[index], strict=True):
                if not torch.equal(actual, wanted):
                    failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(lengths))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _forward_backward(length: int) -> list[torch.Tensor]:
    leaves = [tensor.requires_grad_() for tensor in tensors(length)]
    out = mlr_attention(*leaves, DEEP, is_causal=True, backend="cpu")
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


THREADS = """
import torch
from structattn import Hierarchy, mlr_attention
torch.manual_seed(0)
leaves = [torch.randn(3, 1, 700, 14, requires_grad=True) for _ in range(3)]
hierarchy = Hierarchy((6, 4, 2, 2), (None, 64, 32, 8))
results = []
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    out = mlr_attention(*leaves, hierarchy, is_causal=True, backend="cpu")
    results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
for other in results[1:]:
    for a, b in zip(results[0], other):
        torch.testing.assert_close(a, b)
"""


@needs_kernel
def test_any_number_of_threads():
    result = python(THREADS)
    assert result.returncode == 0, result.stderr


FORK = """
import os, torch
from structattn import Hierarchy, mlr_attention
query = torch.randn(2, 2, 300, 8)
expected = mlr_attention(query, query, query, Hierarchy.flat(8), backend="cpu")

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return mlr_attention(query, query, query, Hierarchy.flat(8), backend="cpu")

loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1, multiprocessing_context="fork")
for actual in loader:
    torch.testing.assert_close(actual, expected)
"""


@needs_kernel
def test_in_a_forked_data_loader():
    result = python(FORK)
    assert result.returncode == 0, result.stderr


# --- determinism, and memory that holds nothing -----------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_is_never_read(dtype):
    query, key, value = (tensor.clone() for tensor in tensors(130, dtype, batch=2))
    start, end = torch.tensor([0, 40]), torch.tensor([100, 130])
    clean = mlr_attention(query, key, value, DEEP, is_causal=True, key_start=start, key_end=end, backend="cpu")
    for tensor in (key, value):
        tensor[0, :, 100:] = torch.nan
        tensor[1, :, :40] = torch.nan
    poisoned = mlr_attention(query, key, value, DEEP, is_causal=True, key_start=start, key_end=end, backend="cpu")
    assert torch.equal(clean, poisoned)


@needs_kernel
def test_nan_in_a_query_stays_in_its_row():
    query, key, value = tensors(130)
    query = query.clone()
    query[0, 0, 70] = torch.nan
    out = mlr_attention(query, key, value, DEEP, is_causal=True, backend="cpu")
    assert out[0, 0, 70].isnan().all()
    assert out.isnan().sum() == out.shape[3]


def test_warns_once(monkeypatch):
    monkeypatch.setattr(cpu, "_warned", False)
    monkeypatch.setattr(library, "failure", lambda: "no kernel today")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [cpu.ineligible() for _ in range(3)] == ["no kernel today"] * 3
    assert len(caught) == 1
