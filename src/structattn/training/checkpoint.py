"""Checkpoints that are whole or absent: a run killed at any moment finds the last one it finished writing.

A checkpoint is one file, `step-00001000.ckpt`: a line that names the format, a line with the SHA-256 of the rest,
and the rest, which `torch.save` wrote. It is written under another name, flushed to the disk and renamed, so
that a file of that name is complete unless the disk itself damaged it; the checksum tells. The last two are kept.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structattn.training.errors import RunFolderError

_logger = logging.getLogger(__name__)

_FORMAT = b"structattn checkpoint 1"
_KEPT = 2

State = dict[str, Any]
"""Tensors, numbers, strings, and lists and dicts of them: what `torch.load(weights_only=True)` reads."""


class DamagedCheckpointError(ValueError):
    """A checkpoint file is cut short or altered, or is no checkpoint."""


@dataclass(frozen=True)
class Restored:
    """The newest checkpoint that could be read, and those that could not."""

    state: State | None
    """What was saved; None where the folder holds no readable checkpoint."""

    path: Path | None
    """The file it came from."""

    damaged: tuple[Path, ...]
    """Newer files that are damaged, newest first."""


def save_checkpoint(folder: Path, step: int, state: State) -> Path:
    """Write the checkpoint of `step` and remove all but the last two.

    Args:
        folder: made where it is missing.
        step: steps done; it names the file.
        state: what to save.

    Returns:
        The file.

    Raises:
        RunFolderError: it cannot be written, for instance because the disk is full. Earlier ones are intact.
    """
    # Serialised in memory first: a file that fails in the midst of torch.save does not always say why.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = b"\n".join([_FORMAT, hashlib.sha256(payload).hexdigest().encode(), b""])
    path = folder / f"step-{step:08d}.ckpt"
    temporary = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_names(folder)
        for old in _checkpoints(folder)[_KEPT:]:
            old.unlink()
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(path, f"the checkpoint cannot be written: {error.strerror}") from error
    return path


def load_checkpoint(path: Path) -> State:
    """The state in one checkpoint file, tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file is cut short or altered, or is no checkpoint; names it.
        RunFolderError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(path, f"the checkpoint cannot be read: {error.strerror}") from error
    kind, _, rest = content.partition(b"\n")
    digest, _, payload = rest.partition(b"\n")
    if kind != _FORMAT:
        raise DamagedCheckpointError(f"{path}: not a checkpoint of this format, or its beginning is damaged")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise DamagedCheckpointError(f"{path}: damaged, the checksum differs")
    state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def restore_checkpoint(folder: Path) -> Restored:
    """The newest checkpoint of `folder` that is whole; damaged ones are logged by name and skipped.

    Raises:
        RunFolderError: a file cannot be read for want of permission.
    """
    damaged: list[Path] = []
    for path in _checkpoints(folder):
        try:
            return Restored(load_checkpoint(path), path, tuple(damaged))
        except DamagedCheckpointError as error:
            _logger.warning("%s; the checkpoint before it is used", error)
            damaged.append(path)
    return Restored(None, None, tuple(damaged))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files, newest first; other files are not ours."""
    steps = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.ckpt")}
    ours = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(ours, key=lambda path: int(steps[path]), reverse=True)


def _flush_names(folder: Path) -> None:
    """Have the disk hold the new name too: a rename is in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
