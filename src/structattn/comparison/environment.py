"""Where a comparison ran: versions, machine, threads, the commit of the code."""

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
    """What `environment.json` holds: all that numbers may depend on besides the config.

    Args:
        command: the command line that asked, if one did.
    """
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
    """The git commit of the checkout that `folder` lies in, with `+changes` where tracked files differ from it.

    None where `folder` is in no checkout, or there is no git.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if not head or not _git(folder, "ls-files"):
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def accelerator() -> str | None:
    """The name of the first GPU, or None."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, or nothing where it fails or is missing."""
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
