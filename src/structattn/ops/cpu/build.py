"""Compile the kernel's shared library from `csrc`, or find it on disk.

The machine's C++ compiler makes it on first use. Two objects are compiled side by side: the kernel with its operators
(`binding.cpp`), and derivatives in C++ (`autograd.cpp`).

Its file name holds a digest of all that it depends on: the sources, the flags, torch's version, and the compiler with
the instructions it may use (its predefined macros show both).
"""

from __future__ import annotations

import hashlib
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

from structattn.disk import cache_folder

SOURCES = Path(__file__).parent / "csrc"
# The products are fast because a·b + c is contracted to one rounding. The other two flags drop checks of floating-point
# exceptions and errno, which no caller reads.
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# Flags of each source: binding.cpp may call torch's brgemm on AMX; autograd.cpp has no hot loop.
_OBJECTS = {"binding.cpp": ["-DSTRUCTATTN_BRGEMM"], "autograd.cpp": ["-O1"]}
_SYSTEMS = ("linux", "darwin")
_MACHINES = ("x86_64", "aarch64", "arm64")
_LINES_OF_AN_ERROR = 8


class BuildError(RuntimeError):
    """The kernel could not be built or loaded. The message says why, with the compiler's last lines."""


def build() -> Path:
    """Return the library's path, compiled if the disk does not have it.

    Environment: `CXX` names the compiler, `STRUCTATTN_CXXFLAGS` adds flags (`-march=haswell`), and
    `STRUCTATTN_CACHE` moves the folder.

    Raises:
        BuildError: without a compiler, or where it fails.
    """
    if sys.platform not in _SYSTEMS or platform.machine() not in _MACHINES:
        raise BuildError(
            f"the kernel is built on Linux and macOS, x86-64 or Arm; this is {sys.platform} {platform.machine()}"
        )
    extra = shlex.split(os.environ.get("STRUCTATTN_CXXFLAGS", ""))
    command = [*_compiler(), *FLAGS, *_target(), *extra]
    library = cache_folder() / f"cpu-{_digest(command)}.so"
    try:
        if not library.exists():
            _compile_once(command, library)
    except OSError as error:
        raise BuildError(f"{library} cannot be written: {error}") from error
    return library


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    default = ["clang++", "c++"] if sys.platform == "darwin" else ["g++", "c++"]
    for command in [named] if named else [[each] for each in default]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {' '.join(named) or default[0]} is not on PATH (CXX names another)")


def _target() -> list[str]:
    return ["-march=native"] if platform.machine() == "x86_64" else ["-mcpu=native"]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256(repr([command, _OBJECTS, torch.__version__]).encode())
    digest.update(_run([*command, "-dM", "-E", "-x", "c++", os.devnull]))
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile_once(command: list[str], library: Path) -> None:
    """Compile `library`, in one process while others that start at once wait."""
    import fcntl  # not on every system that imports this module

    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as directory, ThreadPoolExecutor() as pool:
        objects = {name: Path(directory, name).with_suffix(".o") for name in _OBJECTS}
        includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
        compilations = [
            pool.submit(_run, [*command, *_OBJECTS[name], *includes, "-c", str(SOURCES / name), "-o", str(path)])
            for name, path in objects.items()
        ]
        for compilation in compilations:
            compilation.result()
        built = Path(directory, "built.so")
        linker = [*command[: command.index(FLAGS[0])], "-shared"]
        sanitizers = [flag for flag in command if flag.startswith("-fsanitize")]
        _run([*linker, *sanitizers, *map(str, objects.values()), "-o", str(built), *_libraries()])
        os.replace(built, library)


def _libraries() -> list[str]:
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]  # torch is loaded before the kernel is
    return ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10"]


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        tail = "\n".join(lines[-_LINES_OF_AN_ERROR:])
        raise BuildError(f"{command[0]} failed with exit status {error.returncode}:\n{tail}") from error
