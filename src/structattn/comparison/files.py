"""Files that are whole or absent: each is written under another name, flushed to the disk and renamed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structattn.training.errors import RunFolderError


def safe_name(name: str) -> str:
    """`name` as any file system takes it: whatever it might not take becomes a dash."""
    return re.sub(r"[^A-Za-z0-9.=,+-]+", "-", name)


def make_folder(path: Path) -> None:
    """Make `path` and its parents; RunFolderError saying why where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(path, f"the folder cannot be made: {error.strerror}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, in one step; RunFolderError saying why where that fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunFolderError(path, f"the file cannot be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as JSON for people to read; ValueError where it holds NaN, which JSON has no word for."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put `rows` at `path` as CSV under the names they have, in the order in which those appear."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """The value in the JSON file at `path`; RunFolderError saying why where there is none."""
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise RunFolderError(path, f"damaged, not JSON: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    """The value in each line of the file at `path`; RunFolderError saying why where one is not JSON."""
    try:
        return [json.loads(line) for line in _read(path).splitlines()]
    except ValueError as error:
        raise RunFolderError(path, f"damaged, not lines of JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(path, f"the file cannot be read: {error.strerror}") from error
