"""Build the wheel for Linux: the package with the CPU kernel compiled, one library for each instruction set.

`make wheel` runs it. The libraries use PyTorch's stable ABI alone: one wheel serves every torch from 2.11 on and every
Python. `aarch64-linux-gnu-g++` cross-compiles them for Arm; no Arm machine has run them.

    python wheels/build.py --tools build/wheel/bin            x86-64, repaired by auditwheel into dist/
    python wheels/build.py --machine aarch64 --unrepaired     Arm
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from structattn.ops.cpu.build import FLAGS, SOURCES

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that pyproject.toml takes
# The names are those of structattn.ops.cpu.prebuilt.
FLAGS_OF = {
    "x86_64": {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    },
    "aarch64": {"neon": ["-march=armv8-a"]},
}
COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}


def compile_libraries(machine: str, folder: Path) -> None:
    """Write `folder/<name>.so` for every instruction set of `machine`."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = [COMPILERS[machine]]
    if machine == platform.machine():
        compiler = shlex.split(os.environ.get("CXX", "")) or compiler
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        torch_library = _stand_in_for_torch(compiler, Path(scratch))
        older = Path(scratch, "old_systems.o")
        _run(*compiler, "-std=c++17", "-O2", "-fPIC", "-c", HERE / "old_systems.cpp", "-o", older)

        def compile_one(name: str, flags: list[str]) -> None:
            sources = ["-include", HERE / "old_systems.h", SOURCES / "binding.cpp", older]
            headers = ["-isystem", Path(torch.__file__).parent / "include", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
            link = ["-shared", "-s", "-L", torch_library.parent, "-Wl,--no-as-needed", "-ltorch_cpu"]
            _run(*compiler, *FLAGS, *flags, *headers, *sources, *link, "-o", folder / f"{name}.so")

        compilations = [pool.submit(compile_one, *each) for each in FLAGS_OF[machine].items()]
        for compilation in compilations:
            compilation.result()


def _stand_in_for_torch(compiler: list[str], folder: Path) -> Path:
    """Return an empty libtorch_cpu.so: the kernel names the library it needs, and finds it loaded."""
    empty, library = folder / "empty.cpp", folder / "libtorch_cpu.so"
    empty.touch()
    _run(*compiler, "-shared", empty, "-Wl,-soname,libtorch_cpu.so", "-o", library)
    return library


def build_wheel(machine: str, out: Path) -> Path:
    """Return the path of the wheel of this checkout with its libraries, tagged for this machine's own Linux."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "structattn")
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        compile_libraries(machine, copy / "src/structattn/ops/cpu/prebuilt")
        settings = f"--config-settings=--build-option=--plat-name=linux_{machine}"
        flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", settings, "--wheel-dir", out]
        _run(sys.executable, "-m", "pip", "wheel", copy, *flags)
    (wheel,) = out.glob(f"structattn-*-py3-none-linux_{machine}.whl")
    return wheel


def repair(wheel: Path, out: Path, tools: Path) -> Path:
    """Return the wheel that auditwheel tags for the oldest Linux it loads on; the given one is removed."""
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [
        tools / "auditwheel",
        "repair",
        "--exclude",
        "libtorch*",
        "--exclude",
        "libc10*",
        "--wheel-dir",
        out,
        wheel,
    ]
    subprocess.run(command, check=True, env=environment)
    wheel.unlink()
    (repaired,) = out.glob("structattn-*-py3-none-manylinux*_x86_64.whl")
    return repaired


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def main() -> None:
    """Build, and repair where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=FLAGS_OF, default="x86_64")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--tools", type=Path, default=Path(sys.executable).parent, help="folder with auditwheel")
    parser.add_argument("--unrepaired", action="store_true", help="leave the tag of this machine's own Linux")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob(f"structattn-*_{options.machine}.whl"):
        old.unlink()
    wheel = build_wheel(options.machine, options.out)
    if not options.unrepaired:
        wheel = repair(wheel, options.out, options.tools.absolute())
    sys.stdout.write(f"{wheel}\n")


if __name__ == "__main__":
    main()
