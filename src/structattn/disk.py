"""Find the cache folder for compiled kernels and token files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$STRUCTATTN_CACHE`, else `$XDG_CACHE_HOME/structattn`, else `~/.cache/structattn`."""
    named = os.environ.get("STRUCTATTN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structattn"
