"""Check the served versions: one table, one lock, one version number, clear errors outside."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from requirements import lock

import structattn
from structattn import versions

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def fresh():
    """`check` speaks once in a process."""
    versions.check.cache_clear()
    yield
    versions.check.cache_clear()


def found(monkeypatch, version):
    monkeypatch.setattr(versions, "installed", lambda _: version)


@pytest.mark.parametrize("package", versions.tested())
def test_the_table_is_that_of_pyproject_and_lock(package):
    needed, (oldest, newest) = versions.needed()[package], versions.tested()[package]
    assert re.search(rf'"{package}>={re.escape(needed)}[",]', PROJECT), f"run make lock: {package}>={needed}"
    assert oldest == (lock.SUITE_TORCH[0] if package == "torch" else needed)
    pinned = (ROOT / "Makefile").read_text(encoding="utf-8") if package == "torch" else LOCK
    assert f"{package}=={newest}" in pinned, f"run make lock: {package}=={newest}"


def test_the_table_is_what_make_lock_writes():
    written = json.loads(lock.TESTED.read_text(encoding="utf-8"))
    assert written == lock.tested([line for line in LOCK.splitlines() if not line.startswith("#")])


def test_no_torch_counts_as_tested_that_no_suite_ran_with():
    """The lower bound of torch is supported, which is not the same."""
    assert versions.tested()["torch"] == lock.SUITE_TORCH
    assert versions.standing("torch", versions.needed()["torch"]) == "older"
    versions.check("torch")


def test_the_lock_leaves_torch_out():
    assert not re.search(r"^(torch|triton|nvidia|cuda)", LOCK, flags=re.MULTILINE)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line) for line in LOCK.splitlines()[1:])


def test_the_upper_bound_of_transformers_is_the_newest_tested_minor():
    major, minor, *_ = versions.tested()["transformers"][1].split(".")
    assert f"transformers>=5.17,<{major}.{int(minor) + 1}" in PROJECT


def test_one_version_number():
    assert versions.installed("structattn") == structattn.__version__
    assert f"## {structattn.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in PROJECT


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        (None, "missing"),
        ("5.15.9", "too old"),
        ("5.16", "older"),
        ("5.16.1", "older"),
        ("5.17", "tested"),
        ("5.17.0", "tested"),
        ("5.24.9", "tested"),
        ("5.25.0.dev0", "newer"),
        ("6.0", "newer"),
    ],
)
def test_standing(monkeypatch, version, standing):
    monkeypatch.setattr(versions, "needed", lambda: {"transformers": "5.16"})
    monkeypatch.setattr(versions, "tested", lambda: {"transformers": ("5.17", "5.24.0")})
    assert versions.standing("transformers", version) == standing


def test_an_old_version_is_refused(fresh, monkeypatch):
    found(monkeypatch, "5.16.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer, got 5\.16\.1: pip install -U"):
        versions.check("transformers")


def test_a_new_transformers_is_told_once(fresh, monkeypatch):
    found(monkeypatch, "9.1.0")
    with pytest.warns(UserWarning, match=r"tested with transformers up to [\d.]+, got 9\.1\.0"):
        versions.check("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check("transformers")
        versions.check("numpy")  # Newer ones of other packages have not broken anything yet.


@pytest.mark.parametrize(("module", "package"), [("structattn.ops", "torch"), ("structattn.models", "transformers")])
def test_importing_says_so(module, package):
    """In a process of its own, whose metadata says that the package is old."""
    program = f"""
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "1.0" if name == {package!r} else version(name)
try:
    import {module}
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"structattn needs {package} ")


def test_sub_packages_after_a_bare_import():
    program = """
import json, sys
import structattn
light = "torch" not in sys.modules
public = dir(structattn)
reached = [type(getattr(structattn, name)).__name__ for name in public]
structattn.integrations.transformers.set_hierarchy, structattn.structures.BTT
print(json.dumps([light, public, reached]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    light, public, reached = json.loads(run.stdout)
    assert light
    assert {"Hierarchy", "mlr_attention", "structures", "layers", "models", "integrations"} <= set(public)
    assert not any(name.startswith("_") for name in public if name != "__version__")
    assert reached.count("module") == 8
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        structattn.nonsense  # noqa: B018


def test_info_works_beside_a_version_that_is_too_old():
    """It is the command that says so; the others end in one line."""
    program = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: "5.0.0" if name == "transformers" else version(name)
from structattn.cli import main
sys.exit(main(sys.argv[1:]))
"""
    info, other = (
        subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
        for words in (["info"], ["generate", "--run", "runs/none"])
    )
    assert info.returncode == 0
    assert re.search(r"transformers .*5\.0\.0 .*too old: update it", info.stdout)
    assert info.stderr == ""
    assert other.returncode == 1
    assert other.stderr.startswith("structattn: structattn needs transformers 5.17 or newer, got 5.0.0")
    assert other.stderr.count("\n") == 1
