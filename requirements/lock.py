"""Write exact versions of what this project installs.

python requirements/lock.py torch==2.13.0             the newest of everything, into requirements/lock.txt
python requirements/lock.py torch==2.13.0 --oldest    every lower bound of pyproject.toml, into build/oldest.txt

Both are constraints files that plain pip reads. torch and what its CUDA builds pull stay out of them: which torch is
installed is the caller's choice, and first of all. The lock serves every Python version that pyproject.toml allows; the
file of lower bounds is for the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "lock.txt"
OLDEST = ROOT / "build" / "oldest.txt"
TESTED = ROOT / "src" / "structattn" / "tested.json"
TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEADER = (
    "# Exact versions for this project's own environments, written by `make lock`. torch is installed before them.\n"
)
# Oldest and newest torch that the whole suite ran with: the caller chooses torch, so lock and lower bound cannot tell.
SUITE_TORCH = ("2.13.0", "2.13.0")
FOR_USERS = ("plot", "hf", "forecast", "chronos", "train", "paper", "gguf")


def resolve(torch: str, *options: str) -> list[str]:
    """Return a line `name==version ; marker` for each package.

    uv resolves them beside this torch.
    """
    triton = next(asked for asked in requirements("dev") if asked.name == "triton")
    with tempfile.TemporaryDirectory() as folder:
        constraint, override = Path(folder) / "constraint.txt", Path(folder) / "override.txt"
        constraint.write_text(torch + "\n")
        override.write_text(f"{triton}\n")  # A CUDA build of torch asks for the Triton of its own.
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--extra", "docs"]
        given = ["--constraint", str(constraint), "--override", str(override), "--no-header", "--no-annotate"]
        run = subprocess.run(
            [*command, *given, "--quiet", *options], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
        )
    return [line for line in run.stdout.splitlines() if not TORCH.match(line)]


def requirements(*extras: str) -> list[Requirement]:
    """Return what pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    return [Requirement(line) for line in lines]


def tested(lock: list[str]) -> dict[str, dict[str, str]]:
    """Return lower bound, oldest and newest tested version of each package.

    `make test-oldest` tests the lower bounds and `make test` the lock, but for torch.
    """
    bounds = {asked.name: bound for asked in requirements(*FOR_USERS) if (bound := _lower_bound(asked))}
    newest = {each.name: str(_version(each)) for each in sorted(map(Requirement, lock), key=_version)}
    suites = {name: (bound, newest[name]) for name, bound in bounds.items() if name in newest} | {"torch": SUITE_TORCH}
    return {
        name: {"needed": bounds[name], "oldest": first, "newest": last}
        for name, (first, last) in sorted(suites.items())
    }


def _version(locked: Requirement) -> Version:
    return Version(next(iter(locked.specifier)).version)


def _lower_bound(asked: Requirement) -> str | None:
    return next((each.version for each in asked.specifier if each.operator == ">="), None)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", help="such as torch==2.13.0")
    parser.add_argument("--oldest", action="store_true", help="lower bounds, for `make test-oldest`")
    options = parser.parse_args()
    if options.oldest:
        OLDEST.parent.mkdir(exist_ok=True)
        OLDEST.write_text("\n".join(resolve(options.torch, "--resolution", "lowest-direct")) + "\n")
        return
    lines = resolve(options.torch, "--universal", "--python-version", "3.10")
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    TESTED.write_text(json.dumps(tested(lines), indent=2) + "\n")


if __name__ == "__main__":
    main()
