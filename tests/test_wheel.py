"""The wheel: its libraries, built here, in an environment without a compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from structattn.ops.cpu import prebuilt

ROOT = Path(__file__).parent.parent
NAMES = ("avx2", "avx512", "avx512_bf16")
RUNNABLE = [name for name in NAMES if prebuilt.NEEDS[name] <= prebuilt.instructions()]
# Where torch itself loads: glibc 2.28 and the runtime of GCC 8.
OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
        reason="the wheel is for Linux x86-64, and g++ builds it",
    ),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "wheels/build.py", "--unrepaired", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Return an interpreter that has the wheel and its dependencies.

    The dependencies come by a path.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    return folder / "bin/python"


def run(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter without a compiler on PATH or a cached library."""
    bare = {"PATH": str(python.parent), "HOME": str(python.parent), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-W", "error::UserWarning", *arguments]
    return subprocess.run(command, env=bare | environment, cwd=python.parent, capture_output=True, text=True)


@pytest.mark.parametrize("name", RUNNABLE)
def test_core_of_the_battery(python, name):
    result = run(python, "-m", "tests.ops.core", STRUCTATTN_KERNEL=name)
    assert result.returncode == 0, result.stderr
    path, count = result.stdout.split()
    assert Path(path).relative_to(python.parent.parent).match(f"structattn/ops/cpu/prebuilt/{name}.so")
    assert int(count) > 60


LOADED = "from structattn.ops.cpu import library; library.load(); print(library.state.path)"


def test_the_best_that_the_machine_runs_is_loaded(python):
    result = run(python, "-c", LOADED)
    assert result.returncode == 0, result.stderr
    slow = ["avx512_bf16"] if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else []
    assert Path(result.stdout.strip()).stem == [name for name in RUNNABLE if name not in slow][-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sse2", r"one of the kernels of this installation \(avx512_bf16, avx512, avx2\), got 'sse2'"),
        ("source", r"no C\+\+ compiler: g\+\+ is not on PATH"),
    ],
)
def test_a_kernel_that_is_not_there(python, name, message):
    result = run(python, "-c", LOADED, STRUCTATTN_KERNEL=name)
    assert result.returncode != 0
    assert re.search(message, result.stderr)


def test_a_kernel_that_the_machine_cannot_run(python):
    missing = "from structattn.ops.cpu import prebuilt; prebuilt.instructions = lambda: {'avx2'}\n"
    result = run(python, "-c", missing + LOADED, STRUCTATTN_KERNEL="avx512")
    assert result.returncode != 0
    assert "STRUCTATTN_KERNEL=avx512 needs instructions that this machine lacks: abm, avx, avx512bw" in result.stderr


def test_gradients_and_compiled_models(python):
    code = """
import torch
from structattn import Hierarchy, mlr_attention
given = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3)]
hierarchy = Hierarchy.parse("4|4@8")
def attend(*tensors, backend="auto"):
    return mlr_attention(*tensors, hierarchy, is_causal=True, backend=backend)
def results(function, **options):
    out = function(*given, **options)
    return [out, *torch.autograd.grad(out.square().sum(), given)]
expected = results(attend, backend="reference")
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
for each in (results(attend), results(compiled)):
    for one, other in zip(each, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
query = torch.randn(1, 2, 20, 8)
try:
    ends = (torch.tensor([21]), None, "4|4@8", True, 1.0, 0, 0.0, "auto")
    torch.ops.structattn.mlr_attention(query, query, query, None, None, *ends)
except ValueError as error:
    print(error)
"""
    result = run(python, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "got key_start = 0, key_end = 21 in row 0" in result.stdout


def test_libraries_load_wherever_torch_does(wheel, tmp_path):
    if shutil.which("objdump") is None:
        pytest.skip("objdump of binutils shows the symbols")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, names)
    assert sorted(Path(name).stem for name in names) == sorted(NAMES)
    for name in names:
        symbols = subprocess.run(["objdump", "-T", tmp_path / name], check=True, capture_output=True, text=True).stdout
        for library, version in re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)", symbols):
            assert tuple(map(int, version.split("."))) <= OLDEST[library], f"{name} needs {library}_{version}"
        undefined = [line.split()[-1] for line in symbols.splitlines() if "*UND*" in line]
        assert [symbol for symbol in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", symbol)] == []
        assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
