from __future__ import annotations

import os
import sys
import sysconfig
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structattn.tasks import sources
from structattn.tasks.sources import Files, OpenWebText, open_source

in_tmp_path = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(source) -> list[str]:
    return ["".join(document) for document in source.documents()]


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def message_of(data: str) -> str:
    """Return the one-line message of reading all of `data`."""
    with pytest.raises(ValueError) as caught:
        texts(open_source(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file(tmp_path):
    write(tmp_path, a_txt="one")
    source = open_source(str(tmp_path / "a.txt"))
    assert texts(source) == ["one"]
    assert source.name == str(tmp_path / "a.txt")
    assert not source.holds_out_documents


def test_folder_means_its_txt_files_by_name(tmp_path):
    write(tmp_path, b_txt="two", a_txt="one", c_md="three", B_txt="zero")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", d_txt="four")
    assert texts(open_source(str(tmp_path))) == ["zero", "one", "two"]


def test_pattern_by_path_through_folders(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "a.md").mkdir()
    write(tmp_path, y_md="last", x_md="first")
    write(tmp_path / "z", a_md="below")
    assert texts(open_source(str(tmp_path / "**" / "*.md"))) == ["first", "last", "below"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts(open_source(str(tmp_path / "a[1].txt"))) == ["brackets"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, a_txt="at home")))
    assert texts(open_source("~/a.txt")) == ["at home"]


def test_standard_library():
    source = open_source("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in source.paths]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    assert not any(folder in name.split("/") for name in names for folder in ("test", "tests", "site-packages"))
    assert open_source("stdlib").digest() == source.digest()
    assert sum(map(len, texts(source))) > 5_000_000


def test_python_without_a_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert message_of("stdlib") == (
        f"data: this Python has no source of its standard library in {tmp_path}; name a file instead"
    )


def test_digest_follows_contents_and_order_and_not_names(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    write(one, a_txt="first", b_txt="second")
    write(two, c_txt="first", d_txt="second")
    digest = open_source(str(one)).digest()
    assert open_source(str(two)).digest() == digest
    write(two, d_txt="Second")
    assert open_source(str(two)).digest() != digest
    write(two, c_txt="firsts", d_txt="econd")  # The same characters, cut elsewhere.
    assert open_source(str(two)).digest() != digest
    write(two, c_txt="second", d_txt="first")
    assert open_source(str(two)).digest() != digest


@in_tmp_path
@given(text=st.text(alphabet=st.sampled_from("ab\r\né日😀")), piece=st.integers(1, 9), bom=st.booleans())
def test_pieces_join_to_the_text_wherever_they_are_cut(tmp_path, text, piece, bom):
    path = tmp_path / "text"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE", piece)
        joined = "".join(*Files("text", (path,)).documents())
    assert joined.removeprefix("\ufeff") == text.replace("\r\n", "\n").replace("\r", "\n")


@in_tmp_path
@given(
    text=st.text(alphabet=st.sampled_from("ab\né日😀")),
    bad=st.sampled_from([b"\xff", b"\0", b"\xc3(", b"\xe6\x97", b"\xf0\x9f\x98"]),
    rest=st.sampled_from([b"", b"abc" * 5]),
    piece=st.integers(1, 9),
)
def test_bytes_that_are_not_text_are_named_by_offset(tmp_path, text, bad, rest, piece):
    path = tmp_path / "binary"
    path.write_bytes(text.encode() + bad + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE", piece)
        message = message_of(str(path))
    assert message.startswith(f"data: {path} is not ")
    assert message.endswith(f" at byte offset {len(text.encode())}")


def test_utf_16_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    assert message_of(str(tmp_path / "a.txt")).startswith(f"data: {tmp_path / 'a.txt'} is not ")


def test_missing_and_empty(tmp_path):
    missing = tmp_path / "no.txt"
    assert message_of(str(missing)) == (
        f"data must be stdlib, openwebtext, or an existing file, folder or pattern, got {str(missing)!r}"
    )
    assert message_of("stdlb").endswith("got 'stdlb'; did you mean 'stdlib'?")
    assert message_of("open-web-text").endswith("did you mean 'openwebtext'?")
    assert message_of("") != ""
    write(tmp_path, empty_txt="")
    assert message_of(str(tmp_path / "empty.txt")) == f"data: {tmp_path / 'empty.txt'} is empty"
    assert message_of(str(tmp_path / "*.rst")) == f"data: no file matches the pattern {str(tmp_path / '*.rst')!r}"
    (tmp_path / "below").mkdir()
    assert message_of(str(tmp_path / "below")).startswith(f"data: the folder {tmp_path / 'below'} holds no .txt file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert message_of(str(tmp_path / "pipe")) == f"data: {tmp_path / 'pipe'} is neither a file nor a folder"


def test_unreadable_file(tmp_path, monkeypatch):
    write(tmp_path, a_txt="one")
    path = tmp_path / "a.txt"

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert message_of(str(path)) == f"data: cannot read {path}: Permission denied"
    with pytest.raises(ValueError, match="cannot read"):
        open_source(str(path)).digest()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file_and_folder_on_disk(tmp_path):
    write(tmp_path, a_txt="one")
    (tmp_path / "a.txt").chmod(0)
    assert message_of(str(tmp_path / "a.txt")) == f"data: cannot read {tmp_path / 'a.txt'}: Permission denied"
    tmp_path.chmod(0)
    try:
        assert message_of(str(tmp_path)) == f"data: cannot read {tmp_path}: Permission denied"
    finally:
        tmp_path.chmod(0o700)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert message_of(str(tmp_path)) == f"data: cannot read {tmp_path}: Permission denied"


@pytest.mark.parametrize("data", [3, None, Path("x")])
def test_data_must_be_a_string(data):
    with pytest.raises(TypeError, match="data must be a string"):
        open_source(data)


@pytest.mark.parametrize(
    "data", ["openwebtext:", "openwebtext:0", "openwebtext:-1", "openwebtext:many", "openwebtext:²"]
)
def test_bad_number_of_documents(data):
    assert message_of(data) == f"data must be openwebtext or openwebtext:N with N documents, got {data!r}"


@pytest.mark.parametrize(("data", "expected"), [("openwebtext", 5), ("openwebtext:3", 3), ("openwebtext:9", 5)])
def test_openwebtext_streams_through_datasets(monkeypatch, data, expected):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"text": f"document {index}"} for index in range(5))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = open_source(data)
    assert isinstance(source, OpenWebText)
    assert source.holds_out_documents
    source.digest()
    assert calls == []
    assert texts(source) == [f"document {index}" for index in range(expected)]
    assert calls == [(("Skylion007/openwebtext",), {"split": "train", "streaming": True})]


def test_openwebtext_digest_follows_the_number_of_documents():
    digests = {open_source(data).digest() for data in ("openwebtext", "openwebtext:10", "openwebtext:11")}
    assert len(digests) == 3


def test_openwebtext_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"this needs datasets: pip install 'structattn\[corpora\]'"):
        texts(open_source("openwebtext"))
