"""Write files whole or not at all: under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when the block ends without error.

    Args:
        path: the file; its folder exists. What it held before is intact until the block has ended.
        partial: file to write first, in the same folder; by default `.NAME.partial`. Give one of your own where
            several processes may write `path` at once.

    Raises:
        OSError: a file cannot be opened, written or renamed.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
