"""Save and find checkpoints that survive a kill at any moment.

A checkpoint is one file, `step-00001000.ckpt`. Its first line names the format, the second is the SHA-256 of the rest,
and the rest is the output of `torch.save`. It is written under another name, flushed to the disk and renamed, so
a file of that name is complete unless the disk damaged it, which the checksum shows. The last two are kept.
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

from structattn.atomic import replacing
from structattn.training.errors import RunFolderError

_logger = logging.getLogger(__name__)

_FORMAT = b"structattn checkpoint 1"
_KEPT = 2

State = dict[str, Any]
"""Tensors, numbers and strings, in lists and dicts; `torch.load(weights_only=True)` reads it."""


class DamagedCheckpointError(ValueError):
    """A checkpoint file is truncated or altered, or not a checkpoint."""


@dataclass(frozen=True)
class Restored:
    """The newest intact checkpoint of a folder, and damaged later ones."""

    state: State | None
    """The saved state; None if the folder holds no readable checkpoint."""

    path: Path | None
    """File of the state."""

    damaged: tuple[Path, ...]
    """Newer, damaged files, newest first."""


def save_checkpoint(folder: Path, step: int, state: State) -> Path:
    """Write a checkpoint and remove all but the last two.

    Args:
        folder: made if missing.
        step: steps done; part of the file name.
        state: the state to save.

    Returns:
        The file.

    Raises:
        RunFolderError: it cannot be written, for example on a full disk. Earlier checkpoints stay intact.
    """
    # Serialise in memory first: torch.save does not always say why writing to a file failed.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = b"\n".join([_FORMAT, hashlib.sha256(payload).hexdigest().encode(), b""])
    path = folder / f"step-{step:08d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_suffix(".partial")) as file:
            file.write(header)
            file.write(payload)
        _flush_folder(folder)
        for old in _checkpoints(folder)[_KEPT:]:
            old.unlink()
    except OSError as error:
        raise RunFolderError(path, f"the checkpoint cannot be written: {error.strerror}") from error
    return path


def load_checkpoint(path: Path) -> State:
    """Read one checkpoint file; tensors are on the CPU.

    Raises:
        DamagedCheckpointError: the file is truncated or altered, or not a checkpoint.
        RunFolderError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(path, f"the checkpoint cannot be read: {error.strerror}") from error
    kind, _, rest = content.partition(b"\n")
    digest, _, payload = rest.partition(b"\n")
    if kind != _FORMAT:
        raise DamagedCheckpointError(f"{path}: not a checkpoint of this format, or its first line is damaged")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise DamagedCheckpointError(f"{path}: damaged, the checksum differs")
    state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def restore_checkpoint(folder: Path) -> Restored:
    """Read the newest intact checkpoint of `folder`; warn of damaged ones.

    Raises:
        RunFolderError: a file cannot be read.
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
    """Return the checkpoint files, newest first; ignore other files."""
    steps = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.ckpt")}
    checkpoints = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(checkpoints, key=lambda path: int(steps[path]), reverse=True)


def _flush_folder(folder: Path) -> None:
    """Flush the folder's entries: a rename changes the folder, not the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
