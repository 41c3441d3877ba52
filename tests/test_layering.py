"""The floors of the house: each imports only floors below it, and importing the package stays light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import structattn

ROOT = Path(structattn.__file__).parent

# Each floor with the floors it may import from, besides itself. The ground is `versions`, `checks`, `disk`, `atomic`
# and `drawing`.
FLOORS = {
    "versions": set(),
    "checks": {"versions"},
    "disk": set(),
    "atomic": set(),
    "drawing": {"checks"},
    "structures": {"checks"},
    "ops": {"versions", "checks", "disk", "drawing"},
    "flops": {"checks", "structures", "ops"},
    "layers": {"checks", "structures", "ops", "flops"},
    "models": {"checks", "structures", "ops", "flops", "layers"},
    "integrations": {"checks", "structures", "ops", "flops", "layers", "models"},
    "tasks": {"checks", "disk", "atomic", "drawing", "models"},
    "training": {"checks", "atomic", "structures", "ops", "flops", "layers", "models", "tasks"},
    "comparison": {"versions", "checks", "atomic", "layers", "models", "tasks", "training"},
    "reporting": {"checks", "drawing", "ops", "layers", "comparison"},
    "retrofit": {
        "checks",
        "drawing",
        "ops",
        "flops",
        "layers",
        "models",
        "integrations",
        "tasks",
        "training",
        "comparison",
        "reporting",
    },
    "__main__": {"cli"},
    "cli": {
        "versions",
        "checks",
        "structures",
        "ops",
        "flops",
        "layers",
        "models",
        "integrations",
        "tasks",
        "training",
        "comparison",
        "reporting",
        "retrofit",
    },
}
# The paper's campaign stands beside the package: `paper` imports `structattn`, never the other way.
PAPER = Path(__file__).parents[1] / "paper"
HEAVY = ("transformers", "accelerate", "matplotlib", "pandas", "tyro", "rich", "datasets", "tensorboard", "wandb")


def _imports(path):
    """`(line, module)` of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "structattn":
                yield from ((node.lineno, f"structattn.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def _floor(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


def violations(files):
    """Imports that climb, as text."""
    found = []
    for path in files:
        floor = _floor(path)
        if floor is None:
            continue
        if floor not in FLOORS:
            found.append(f"{path}: {floor} is not a floor of the house")
            continue
        for line, module in _imports(path):
            parts = module.split(".")
            if parts[0] != "structattn":
                continue
            target = parts[1] if len(parts) > 1 else "the package itself"
            if target != floor and target not in FLOORS[floor] and target != "__version__":
                found.append(f"{path}:{line}: {floor} imports {target}")
    return found


def test_floors_import_only_downwards():
    assert violations(ROOT.rglob("*.py")) == []


def test_the_package_does_not_import_what_stands_beside_it():
    beside = {"paper", "benchmarks", "examples", "tests"}
    imports = [(path, line, module) for path in ROOT.rglob("*.py") for line, module in _imports(path)]
    assert [each for each in imports if each[2].partition(".")[0] in beside] == []


def test_studies_of_the_paper_do_not_import_their_command_line():
    """Nor does the study of Chronos import the other studies, which hold runs of it."""
    upper = {"paper.actions", "paper.cli", "paper.commands", "paper.progress"}
    for path in PAPER.rglob("*.py"):
        modules = {module for _, module in _imports(path)}
        if path.stem not in ("__main__", "actions", "cli", "progress"):
            assert not modules & upper, path
            assert not any(module.startswith("structattn.cli") for module in modules), path
        if path.parent != PAPER:
            assert all(module.startswith("paper.chronos.") for module in modules if module.startswith("paper")), path


def test_the_check_sees_a_climb(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ops").mkdir()
    climb = tmp_path / "ops" / "x.py"
    climb.write_text("def f():\n    from structattn.layers import MLRAttention\n")
    assert violations([climb]) == [f"{climb}:2: ops imports layers"]


@pytest.mark.parametrize("module", ["structattn", "structattn.ops", "structattn.structures", "structattn.layers"])
def test_imports_are_light(module):
    """Beside torch and numpy nothing heavy is imported, and nothing is compiled or downloaded."""
    program = (
        f"import json, sys, torch; before = set(sys.modules); import {module}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert not loaded & set(HEAVY)
