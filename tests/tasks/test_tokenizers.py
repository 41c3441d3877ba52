"""Tokenizers, the corpora they make, and bits per byte."""

import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tokenizers
import transformers

from structattn.tasks import LanguageConfig, LanguageTask
from structattn.tasks.corpus import load_corpus, load_tokenizer
from structattn.tasks.tokenizers import (
    UNKNOWN,
    AsciiTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    HuggingFaceTokenizer,
    read_tokenizer,
    saved_tokenizer,
)
from tests.tasks.battery import TaskBattery, joined

TEXT = "Съешь ещё этих мягких булок, naïve café 日本語 𝄞.\n" * 40


def byte_pairs(text=TEXT):
    """Return a byte-level tokenizer: some of its tokens are parts of a character."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def whole_words():
    """Return a tokenizer that drops spaces and knows two words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "да": 1, "no": 2}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_pairs().save(str(path))
    return path


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(params=["characters", "bytes", "file"])
def tokenizer(request, file):
    made = {"characters": CharacterTokenizer(TEXT), "bytes": ByteTokenizer()}
    return made.get(request.param) or read_tokenizer(str(file))


def test_text_comes_back_and_its_bytes_are_counted(tokenizer):
    tokens, widths = tokenizer.encode_with_bytes(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert np.array_equal(tokens, tokenizer.encode(TEXT))
    assert len(widths) == len(tokens)
    assert widths.sum() == len(TEXT.encode())
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.size


@pytest.mark.parametrize("kind", ["characters", "bytes", "pairs", "words"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_any_text_sum_to_its_own(kind, text):
    tokens, widths = _TOKENIZERS[kind].encode_with_bytes(text)
    assert (widths >= 0).all()
    assert widths.sum() == (len(text.encode()) if len(tokens) else 0)


def _of(made):
    return HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made))


_TOKENIZERS = {
    "characters": CharacterTokenizer(TEXT),
    "bytes": ByteTokenizer(),
    "pairs": _of(byte_pairs()),
    "words": _of(whole_words()),
}


def test_bytes_between_tokens_count_for_the_next_and_the_last():
    tokens, widths = _TOKENIZERS["words"].encode_with_bytes("да  no да ")
    assert tokens.tolist() == [1, 2, 1]
    assert widths.tolist() == [4, 4, 6]


def test_long_texts_reach_the_tokenizer_in_pieces(monkeypatch):
    monkeypatch.setattr("structattn.tasks.tokenizers._PIECE", 20)
    for text in ("да\nno\n" * 9, "да" * 30):
        tokens, widths = _TOKENIZERS["pairs"].encode_with_bytes(text)
        assert _TOKENIZERS["pairs"].decode(tokens) == text
        assert widths.sum() == len(text.encode())


def test_characters_are_numbered_by_code_point_and_the_rest_is_one_token():
    tokenizer = CharacterTokenizer("banana\né")
    assert tokenizer.vocabulary == "\nabné"
    assert tokenizer.size == 6
    tokens, widths = tokenizer.encode_with_bytes("bé日zz\n")
    assert tokens.tolist() == [2, 4, 5, 5, 5, 0]
    assert widths.tolist() == [1, 2, 3, 1, 1, 1]
    assert tokenizer.decode(tokens) == f"bé{UNKNOWN * 3}\n"


def test_bytes_that_are_no_text_decode_to_unknown_characters():
    assert ByteTokenizer().decode([0xD0, 0x61, 0xD0, 0xB4]) == f"{UNKNOWN}aд"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    folder = tmp_path / "model"
    assert saved_tokenizer(folder) == "ascii"
    tokenizer.save(folder)
    again = read_tokenizer(saved_tokenizer(folder))
    assert type(again) is type(tokenizer)
    assert (again.digest, again.size) == (tokenizer.digest, tokenizer.size)
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert not list(folder.glob(".*"))


def test_tokenizers_differ_in_their_digests(file):
    made = [CharacterTokenizer("ab"), CharacterTokenizer("abc"), ByteTokenizer(), *_TOKENIZERS.values()]
    assert len({each.digest for each in made}) == len(made) - 1  # bytes are there twice
    assert read_tokenizer(str(file)).digest == read_tokenizer(str(file.parent)).digest


def test_a_folder_of_transformers_is_read(file, tmp_path):
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").exists()
    assert np.array_equal(read_tokenizer(str(tmp_path)).encode(TEXT), read_tokenizer(str(file)).encode(TEXT))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("charcters", None, "tokenizer must be characters, bytes, ascii, or .*; did you mean 'characters'"),
        ("model", {}, "tokenizer: the folder .*model holds no tokenizer"),
        ("model", {"tokenizer.json": "{"}, "model cannot be read as a Hugging Face tokenizer: "),
        (
            "model",
            {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
            "cannot be read as a Hugging Face tokenizer",
        ),
        ("model/a", {"a": "text"}, "model/a cannot be read as a Hugging Face tokenizer: "),
        ("model", {"structattn_tokenizer.json": "{}"}, "structattn_tokenizer.json is damaged"),
        ("model", {"structattn_tokenizer.json": '{"kind": "characters", "characters": ""}'}, "is damaged"),
    ],
)
def test_bad_paths_are_one_line(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "model").mkdir()
        for file_name, line in content.items():
            (tmp_path / "model" / file_name).write_text(line)
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("a\n")
    (tmp_path / "config.json").write_text("{}")
    slow = types.SimpleNamespace(is_fast=False)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: slow)
    with pytest.raises(ValueError, match="must be backed by the library tokenizers"):
        read_tokenizer(str(tmp_path))


def test_names_that_are_no_text_are_refused():
    with pytest.raises(TypeError, match="tokenizer must be a string, got 3"):
        LanguageConfig(tokenizer=3)
    with pytest.raises(ValueError, match="tokenizer must not be empty"):
        LanguageConfig(tokenizer="")
    with pytest.raises(TypeError, match="tokenizer must be an AsciiTokenizer or a TextTokenizer, got str"):
        load_corpus("stdlib", tokenizer="bytes")


# --- corpora ----------------------------------------------------------------------------------------------------------


def test_every_tokenizer_holds_out_the_same_text(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    for name, text in {"a": f"\n{TEXT}\n\n", "b": "", "c": "naïve", "d": TEXT[:100]}.items():
        (tmp_path / "data" / f"{name}.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "data"), tmp_path / "cache", tokenizer)
    inner = TEXT.strip("\n")
    cut = len(inner) - len(inner) // 20
    held_out = f"{inner[cut:]}\n\n{TEXT[95:100]}"
    assert tokenizer.decode(corpus.train) == f"{inner[:cut]}\n\nnaïve\n\n{TEXT[:95]}"
    assert tokenizer.decode(corpus.validation) == held_out
    assert corpus.validation_bytes.sum() == len(held_out.encode())


def test_characters_are_those_of_the_training_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab\n" * 32 + "dcdcd", encoding="utf-8")  # The last five of 101 characters are held out.
    tokenizer = load_tokenizer("characters", str(path), tmp_path / "cache")
    assert tokenizer.vocabulary == "\nab"
    config = LanguageConfig(str(path), 2, 2, tokenizer="characters")
    task = LanguageTask(config, cache=tmp_path / "cache")
    assert task.corpus.validation.tolist() == [3] * 5
    assert task.data_summary.endswith(
        "96 characters to train on, 5 to validate on, a vocabulary of 4; 5 unknown characters to validate on"
    )
    path.write_text("", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"the training part of .*b.txt has no characters"):
        load_tokenizer("characters", str(tmp_path / "b.txt"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"b.txt has no text"):
        load_corpus(str(tmp_path / "b.txt"), tmp_path / "cache", ByteTokenizer())


def test_the_cache_keeps_tokenizers_apart(text, tmp_path, monkeypatch):
    made = {kind: load_corpus(str(text), None, each) for kind, each in _TOKENIZERS.items()}
    made["ascii"] = load_corpus(str(text))
    assert len({corpus.digest for corpus in made.values()}) == 5
    vocabulary = load_tokenizer("characters", str(text))
    monkeypatch.setattr("structattn.tasks.corpus._texts", lambda *_: pytest.fail("the text was read again"))
    for kind, each in _TOKENIZERS.items():
        assert np.array_equal(load_corpus(str(text), None, each).train, made[kind].train)
    assert load_tokenizer("characters", str(text)).vocabulary == vocabulary.vocabulary
    assert made["ascii"].validation_bytes is None


def test_many_characters_take_wider_tokens(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 400))) * 2, encoding="utf-8")
    tokenizer = load_tokenizer("characters", str(path), tmp_path / "cache")
    corpus = load_corpus(str(path), tmp_path / "cache", tokenizer)
    assert corpus.train.dtype == np.uint16
    assert corpus.train.tolist() == [*range(400), *range(360)]


# --- bits per byte ----------------------------------------------------------------------------------------------------


class TestLanguageTaskInCharacters(TaskBattery):
    @pytest.fixture(autouse=True)
    def _text(self, text):
        text.write_text("".join(map(chr, np.random.default_rng(0).integers(0x400, 0x500, 2000))), encoding="utf-8")
        self.path = text

    def make(self, seed=0):
        return LanguageTask(LanguageConfig(str(self.path), 8, 64, tokenizer="characters"), seed=seed)

    def outputs(self, batch):
        size = self.make().vocabulary_size
        return torch.nn.functional.one_hot(batch["inputs"], size).float() * 3 + torch.arange(size) / 50


def test_bits_per_byte_by_hand(text):
    """Two windows of three targets, at both ends of `aдaдa日aдaд`: even predictions among the three tokens."""
    text.write_text("aд" * 100 + "aдaдa日aдaд", encoding="utf-8")
    task = LanguageTask(LanguageConfig(str(text), 3, 6, tokenizer="characters"))
    assert task.tokenizer.vocabulary == "aд"
    assert task.tokenizer.decode(task.corpus.validation) == f"aдaдa{UNKNOWN}aдaд"
    batch = joined(list(task.evaluation_batches(1)))
    assert batch["inputs"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert batch["target_bytes"].tolist() == [[2, 1, 2], [2, 1, 2]]
    totals = task.totals(torch.zeros(2, 3, 3), batch)
    metrics = task.metrics(totals)
    assert totals["bytes"].item() == (2 + 1 + 2) + (2 + 1 + 2)
    assert metrics["nats_per_character"] == pytest.approx(math.log(3))
    assert metrics["bits_per_character"] == pytest.approx(math.log2(3))
    assert metrics["bits_per_byte"] == pytest.approx(6 * math.log2(3) / 10)
    assert list(task.units) == ["nats_per_character", "bits_per_character", "bits_per_byte"]


def test_a_uniform_model_of_bytes_has_eight_bits_per_byte(text):
    task = LanguageTask(LanguageConfig(str(text), 8, 64, tokenizer="bytes"))
    batch = next(task.evaluation_batches(100))
    assert (batch["target_bytes"] == 1).all()
    metrics = task.metrics(task.totals(torch.zeros(*batch["targets"].shape, 256), batch))
    assert metrics == {"nats_per_byte": pytest.approx(math.log(256)), "bits_per_byte": pytest.approx(8)}


def test_tokens_of_hugging_face_by_hand(tmp_path):
    (tmp_path / "text.txt").write_text("да no " * 60 + "да  no да", encoding="utf-8")
    whole_words().save(str(tmp_path / "tokenizer.json"))
    config = LanguageConfig(str(tmp_path / "text.txt"), 2, 100, tokenizer=str(tmp_path))
    task = LanguageTask(config, cache=tmp_path / "cache")
    assert task.vocabulary_size == 3
    batch = joined(list(task.evaluation_batches(4)))
    totals = task.totals(torch.zeros(*batch["targets"].shape, 3), batch)
    metrics = task.metrics(totals)
    assert set(metrics) == {"nats_per_token", "bits_per_byte"}
    count, width = batch["targets"].numel(), batch["target_bytes"].sum().item()
    assert metrics["bits_per_byte"] == pytest.approx(count * math.log2(3) / width)
    assert task.corpus.validation_bytes.sum() == len(("да no " * 60 + "да  no да")[-18:].encode())


def test_the_ascii_table_has_no_bits_per_byte(text):
    task = LanguageTask(LanguageConfig(str(text), 8, 64))
    assert isinstance(task.tokenizer, AsciiTokenizer)
    assert list(task.units) == ["nats_per_character", "bits_per_character"]
    assert set(next(task.evaluation_batches(4))) == {"inputs", "targets"}
    assert json.loads(json.dumps(task.data_summary)).endswith("to validate on")
