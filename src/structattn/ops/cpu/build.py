"""Compile the kernel's shared library, or load it from disk.

The machine's C++ compiler makes it on first use.

Its file name holds a digest of all that it depends on: the sources, the flags, torch's version, and the compiler with
the instructions it may use (its predefined macros show both).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from structattn.disk import cache_folder

_SOURCES = Path(__file__).parent / "csrc"
# The products are fast because a·b + c is contracted to one rounding. The other two flags drop checks of floating-point
# exceptions and errno, which no caller reads.
_FLAGS = ["-std=c++20", "-O3", "-DSTRUCTATTN_BRGEMM", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_LINES_OF_AN_ERROR = 8


class BuildError(RuntimeError):
    """The kernel could not be built or loaded; the message says why, with the compiler's last lines."""


def load() -> ctypes.CDLL:
    """Return the library, compiled if the disk does not have it.

    Environment: `CXX` names the compiler, `STRUCTATTN_CXXFLAGS` adds flags (`-march=haswell`), and
    `STRUCTATTN_CACHE` moves the folder.

    Raises:
        BuildError: without a compiler, or where it fails.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise BuildError(f"the kernel is built on Linux, x86-64 or Arm; this is {sys.platform} {platform.machine()}")
    extra = shlex.split(os.environ.get("STRUCTATTN_CXXFLAGS", ""))
    command = [*_compiler(), *_FLAGS, *_target(), *extra]
    library = cache_folder() / f"cpu-{_digest(command)}.so"
    try:
        if not library.exists():
            _compile_once(command, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be written or loaded: {error}") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {' '.join(named) or 'g++'} is not on PATH (CXX names another)")


def _target() -> list[str]:
    return ["-mcpu=native"] if platform.machine() == "aarch64" else ["-march=native"]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256(repr([command, torch.__version__]).encode())
    digest.update(_run([*command, "-dM", "-E", "-x", "c++", os.devnull]))
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile_once(command: list[str], library: Path) -> None:
    """Compile `library`; of processes that start at once, one compiles and the others wait."""
    import fcntl  # not on every system that imports this module

    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)


def _compile(command: list[str], library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built = Path(directory, "built.so")
        compiled = Path(directory, "binding.o")
        include = ["-isystem", str(torch_root / "include")]
        _run([*command, abi, *include, "-c", str(_SOURCES / "binding.cpp"), "-o", str(compiled)])
        # Linked without -fopenmp: its symbols come from the runtime that torch has loaded, so that there is one pool
        # of threads, and not a second one beside torch's.
        linker = [*command[: command.index(_FLAGS[0])], "-shared"]
        sanitizers = [flag for flag in command if flag.startswith("-fsanitize")]
        libraries = ["-L", str(torch_root / "lib"), "-ltorch_cpu", "-lc10"]
        _run([*linker, *sanitizers, str(compiled), "-o", str(built), *libraries])
        os.replace(built, library)


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        tail = "\n".join(lines[-_LINES_OF_AN_ERROR:])
        raise BuildError(f"{command[0]} failed with exit status {error.returncode}:\n{tail}") from error


@functools.lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why there is no library in this process, or None if there is one; tried once."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the library of this process, loaded once; BuildError as `load`."""
    return load()
