"""Record versions, machine, threads and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from structattn import __version__, versions

_PACKAGES = (*versions.tested(), "triton")


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything that results may depend on besides the config."""
    return {
        "structattn": __version__,
        "commit": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: versions.installed(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory() / 2**30, 1),
        "accelerator": accelerator(),
        "command": list(command),
    }


def commit(folder: Path) -> str | None:
    """Return the git commit of the checkout of `folder`.

    `+changes` follows it if tracked files differ. None if `folder` is in no checkout, or git is missing.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if not head or not _git(folder, "ls-files"):
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """Return the name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def accelerator() -> str | None:
    """Return the name of the first GPU, or None."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _memory() -> int:
    """Return the bytes of main memory; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of git; nothing if it fails."""
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
