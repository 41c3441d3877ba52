"""Checkpoints are complete or absent, two are kept, damage is detected and named."""

import errno
import logging
import os

import pytest
import torch

from structattn.training import RunFolderError
from structattn.training.checkpoint import (
    DamagedCheckpointError,
    load_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)


def state(step):
    return {"step": step, "tensor": torch.full((3,), float(step)), "nested": {"list": [1, "two", torch.arange(2)]}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_state_is_read_back(tmp_path):
    path = save_checkpoint(tmp_path / "new", 7, state(7))
    assert path.name == "step-00000007.ckpt"
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded["tensor"], torch.full((3,), 7.0))
    assert torch.equal(loaded["nested"]["list"][2], torch.arange(2))


def test_the_last_two_are_kept(tmp_path):
    for step in (9, 10, 100_000_000, 200_000_000):
        save_checkpoint(tmp_path, step, state(step))
    assert names(tmp_path) == ["step-100000000.ckpt", "step-200000000.ckpt"]
    restored = restore_checkpoint(tmp_path)
    assert restored.state is not None
    assert (restored.state["step"], restored.damaged) == (200_000_000, ())


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "step-best.ckpt").write_bytes(b"mine")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step))
    assert names(tmp_path) == ["step-00000002.ckpt", "step-00000003.ckpt", "step-best.ckpt"]
    assert restore_checkpoint(tmp_path).damaged == ()


def test_an_empty_folder_has_none(tmp_path):
    restored = restore_checkpoint(tmp_path / "missing")
    assert (restored.state, restored.path, restored.damaged) == (None, None, ())


def damage_cut(content):
    return content[: len(content) // 2]


def damage_bit(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def damage_header(content):
    return b"x" + content[1:]


def damage_all(content):
    return b""


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_header, damage_all])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, caplog, damage):
    good, bad = (save_checkpoint(tmp_path, step, state(step)) for step in (1, 2))
    bad.write_bytes(damage(bad.read_bytes()))
    with caplog.at_level(logging.WARNING):
        restored = restore_checkpoint(tmp_path)
    assert restored.state is not None
    assert (restored.state["step"], restored.path, restored.damaged) == (1, good, (bad,))
    (record,) = caplog.records
    assert str(bad) in record.getMessage()
    assert "the checkpoint before it is used" in record.getMessage()
    with pytest.raises(DamagedCheckpointError, match=bad.name):
        load_checkpoint(bad)


def test_all_damaged(tmp_path):
    paths = [save_checkpoint(tmp_path, step, state(step)) for step in (1, 2)]
    for path in paths:
        path.write_bytes(b"gone")
    restored = restore_checkpoint(tmp_path)
    assert (restored.state, restored.damaged) == (None, (paths[1], paths[0]))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, state(1))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        monkeypatch.setattr("pathlib.Path.open", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(RunFolderError, match=r"step-00000002.ckpt: the checkpoint cannot be written: No space left"):
        save_checkpoint(tmp_path, 2, state(2))
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001.ckpt"]
    assert restore_checkpoint(tmp_path).state["step"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / "step-00000002.partial").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000001.ckpt"]


def test_partial_files_of_a_killed_write_are_ignored(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / "step-00000002.partial").write_bytes(b"half")
    assert restore_checkpoint(tmp_path).state["step"] == 1
    save_checkpoint(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000001.ckpt", "step-00000002.ckpt"]
