"""Where the package keeps what it can make again: compiled kernels, token files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$STRUCTATTN_CACHE`; where it is not set `structattn` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    named = os.environ.get("STRUCTATTN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structattn"
