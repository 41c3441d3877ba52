from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from structattn.disk import cache_folder
from structattn.tasks import corpus as corpus_module
from structattn.tasks.characters import decode
from structattn.tasks.corpus import load_corpus


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def message_of(*arguments) -> str:
    with pytest.raises(ValueError) as caught:
        load_corpus(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def forbid_building(monkeypatch):
    def refuse(*_):
        pytest.fail("the corpus was built again")

    monkeypatch.setattr(corpus_module, "_build", refuse)


def test_last_twentieth_of_each_file_is_held_out_and_parts_are_joined_by_a_blank_line(tmp_path, cache):
    write(tmp_path / "data" / "b.txt", "B" * 95 + "b" * 5)
    write(tmp_path / "data" / "a.txt", "\n\n" + "A" * 58 + "aa\n")  # 60 characters once newlines at the ends are off.
    write(tmp_path / "data" / "c.txt", "C" * 18 + "cc")  # 20: 5% are one character.
    corpus = load_corpus(str(tmp_path / "data"), cache)
    assert decode(corpus.train) == "A" * 57 + "\n\n" + "B" * 95 + "\n\n" + "C" * 18 + "c"
    assert decode(corpus.validation) == "Aaa" + "\n\n" + "b" * 5 + "\n\n" + "c"
    assert corpus.name == str(tmp_path / "data")


def test_short_files_are_not_held_out_and_blank_ones_leave_no_trace(tmp_path, cache):
    write(tmp_path / "data" / "a.txt", "x" * 19)
    write(tmp_path / "data" / "b.txt", "")
    write(tmp_path / "data" / "c.txt", "\n\n日本\n")
    write(tmp_path / "data" / "d.txt", "y")
    corpus = load_corpus(str(tmp_path / "data"), cache)
    assert decode(corpus.train) == "x" * 19 + "\n\n" + "y"
    assert corpus.validation.shape == (0,)


def test_tokens_are_mapped_read_only(tmp_path, cache):
    corpus = load_corpus(write(tmp_path / "a.txt", "text " * 20), cache)
    for tokens in (corpus.train, corpus.validation):
        assert tokens.dtype == np.uint8
        assert isinstance(tokens.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1


def test_openwebtext_holds_out_every_twentieth_document(cache, monkeypatch):
    rows = [{"text": f"document {index}"} for index in range(45)]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: iter(rows)))
    corpus = load_corpus("openwebtext:45", cache)
    assert decode(corpus.validation).split("\n\n") == ["document 19", "document 39"]
    assert decode(corpus.train).split("\n\n") == [f"document {i}" for i in range(45) if i not in (19, 39)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_corpus("openwebtext:45", cache).digest == corpus.digest


def test_second_load_reads_the_cache_and_an_edit_does_not(tmp_path, cache, monkeypatch):
    first = load_corpus(write(tmp_path / "a.txt", "first " * 20), cache)
    os.rename(tmp_path / "a.txt", tmp_path / "b.txt")
    with monkeypatch.context() as patch:
        forbid_building(patch)
        again = load_corpus(str(tmp_path / "b.txt"), cache)
    assert again.digest == first.digest
    assert np.array_equal(again.train, first.train)
    edited = load_corpus(write(tmp_path / "b.txt", "other " * 20), cache)
    assert edited.digest != first.digest
    assert decode(edited.train[:5]) == "other"
    assert len(list(cache.iterdir())) == 4


def test_another_format_is_another_cache(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.txt", "text " * 20)
    digest = load_corpus(path, cache).digest
    monkeypatch.setattr(corpus_module, "_FORMAT", 2)
    assert load_corpus(path, cache).digest != digest


def test_half_a_cache_is_built_again(tmp_path, cache):
    path = write(tmp_path / "a.txt", "text " * 20)
    first = load_corpus(path, cache)
    (cache / f"{first.digest}.validation.u8").unlink()
    assert np.array_equal(load_corpus(path, cache).validation, first.validation)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_nothing(tmp_path, cache, monkeypatch, failure):
    path = write(tmp_path / "data" / "a.txt", "text " * 20)
    write(tmp_path / "data" / "b.txt", "more " * 20)
    append, calls = corpus_module._append, []

    def fail_later(file, tokens):
        append(file, tokens)
        calls.append(file)
        if len(calls) == 3:
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_append", fail_later)
        with pytest.raises(type(failure)):
            load_corpus(str(Path(path).parent), cache)
    assert len(calls) == 3
    assert list(cache.iterdir()) == []
    assert len(load_corpus(str(Path(path).parent), cache).train) == 2 * 95 + 2


def test_bad_file_among_good_ones_leaves_nothing(tmp_path, cache):
    write(tmp_path / "data" / "a.txt", "text " * 20)
    (tmp_path / "data" / "b.txt").write_bytes(b"abc\xff")
    assert message_of(str(tmp_path / "data"), cache) == (
        f"data: {tmp_path / 'data' / 'b.txt'} is not UTF-8 text: invalid start byte at byte offset 3"
    )
    assert list(cache.iterdir()) == []


def test_nothing_left_to_read(tmp_path, cache):
    path = write(tmp_path / "a.txt", "日本語\n\n")
    assert message_of(path, cache) == f"data: {path} holds no character of the vocabulary"
    write(tmp_path / "data" / "a.txt", "")
    write(tmp_path / "data" / "b.txt", "\n")
    assert message_of(str(tmp_path / "data"), cache).endswith("holds no character of the vocabulary")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("foreign", "warned"), [(15, False), (60, True)])
def test_text_mostly_outside_the_vocabulary_is_reported(tmp_path, cache, caplog, foreign, warned):
    path = write(tmp_path / "a.txt", "x" * 100 + "日" * foreign)
    with caplog.at_level(logging.WARNING, logger="structattn"):
        load_corpus(path, cache)
    expected = f"data: of the 160 characters of {path} only 100 are left after mapping to printable ASCII"
    assert [record.getMessage() for record in caplog.records] == [expected] * warned


def test_cache_folder_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "a.txt", "text " * 20)
    assert message_of(path, path) == (
        f"the cache folder {path} cannot be written: File exists; set STRUCTATTN_CACHE to another"
    )


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    corpus = load_corpus(write(tmp_path / "a.txt", "text " * 20))
    assert (tmp_path / "named" / f"{corpus.digest}.train.u8").stat().st_size == len(corpus.train)
    monkeypatch.delenv("STRUCTATTN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "structattn"


_BUILD = """
import hashlib, sys
from structattn.tasks import LanguageConfig, LanguageTask
task = LanguageTask(LanguageConfig(sys.argv[1], context_length=64), seed=5, cache=sys.argv[2])
tensors = [task.batch(3, 8)["inputs"], *(batch["targets"] for batch in task.evaluation_batches(4))]
sys.stdout.write(hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest())
"""


def test_several_processes_build_one_corpus_at_once_and_draw_the_same(tmp_path, cache):
    path = write(tmp_path / "a.txt", "".join(f"line {n} of a text\n" for n in range(100_000)))
    command = [sys.executable, "-c", _BUILD, path, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers[0]) == 64
    assert len(set(answers)) == 1
    assert sorted(path.suffixes for path in cache.iterdir()) == [[".train", ".u8"], [".validation", ".u8"]]
