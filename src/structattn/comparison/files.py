"""Write text and JSON files completely or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from structattn.atomic import replacing
from structattn.training.errors import RunFolderError


def safe_name(name: str) -> str:
    """Return `name` with dashes for characters that file systems refuse."""
    return re.sub(r"[^A-Za-z0-9.=,+-]+", "-", name)


def make_folder(path: Path) -> None:
    """Make `path` and its parents; RunFolderError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(path, f"the folder cannot be made: {error.strerror}") from error


def remove(folder: Path, *names: str) -> None:
    """Delete files and subfolders of `folder`; ignore missing ones."""
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step; RunFolderError if that fails."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise RunFolderError(path, f"the file cannot be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON; ValueError if it holds NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; RunFolderError if missing or damaged."""
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise RunFolderError(path, f"damaged, not JSON: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    """Return the value of each line; RunFolderError if missing or damaged."""
    try:
        return [json.loads(line) for line in _read(path).splitlines()]
    except ValueError as error:
        raise RunFolderError(path, f"damaged, not lines of JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(path, f"the file cannot be read: {error.strerror}") from error
