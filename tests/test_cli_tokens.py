"""The option `--tokens` from comparison to generated text, and runs of before it."""

import json
import shutil

import pytest

pytest.importorskip("tyro")
pytest.importorskip("transformers")

from structattn.cli import main
from structattn.cli.writing import _Words
from structattn.comparison.results import Results
from structattn.comparison.run import load_run
from structattn.reporting.table import table
from structattn.tasks.tokenizers import ByteTokenizer, CharacterTokenizer, read_tokenizer
from tests.tasks.test_tokenizers import byte_pairs

TEXT = "Всё смешалось в доме Облонских — naïve café, 日本語. " * 60
TINY = ["--layers", "1", "--dim", "16", "--heads", "2", "--batch-size", "4", "--context", "16", "--steps", "3"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    byte_pairs(TEXT).save(str(tmp_path / "tok.json"))
    (tmp_path / "folder").mkdir()
    byte_pairs(TEXT).save(str(tmp_path / "folder" / "tokenizer.json"))
    return path


def _compare(text, out, *options):
    command = ["compare", "language", "--attentions", "standard", "mlr:4,4", "--data", str(text), "--out", str(out)]
    return main([*command, *TINY, *options])


@pytest.mark.parametrize(
    ("tokens", "columns", "size"),
    [
        ("characters", ["nats/char", "bits/char", "bits/byte"], len(set(TEXT)) + 1),
        ("bytes", ["nats/byte", "bits/byte"], 256),
        ("tok.json", ["nats/token", "bits/byte"], 300),
        ("folder", ["nats/token", "bits/byte"], 300),
    ],
)
def test_a_run_needs_nothing_but_its_folder(text, tmp_path, capsys, tokens, columns, size):
    out = tmp_path / "out"
    name = str(tmp_path / tokens) if (tmp_path / tokens).exists() else tokens
    assert _compare(text, out, "--tokens", name) == 0
    results = Results.load(out)
    made = table(results)
    assert list(made.headings[4 : 4 + len(columns)]) == columns
    assert all(heading in (out / "report.html").read_text() for heading in columns)
    final = results.runs[0].final
    recorded = json.loads((out / "results.json").read_text())["runs"][0]["final"]
    assert recorded["bits_per_byte"] == final["bits_per_byte"] > 0

    for path in (tmp_path / "tok.json", tmp_path / "folder", tmp_path / "cache"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = tmp_path / "other.txt"
    text.rename(other)
    capsys.readouterr()
    run = out / results.runs[0].folder
    assert load_run(run)[1].config.vocab_size == size
    assert main(["evaluate", "--run", str(run), "--data", str(other)]) == 0
    assert f"{final['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    texts = []
    for folder in (run, run):
        assert main(["generate", "--run", str(folder), "--prompt", "Всё café", "--length", "30"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Всё café")
    assert len(texts[0]) > len("Всё café") + 8


def test_characters_are_the_default_and_unseen_ones_are_counted(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert _compare(text, out) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["task"]["tokenizer"] == "characters"
    other = tmp_path / "other.txt"
    other.write_text("Ωmega 日本 " * 100, encoding="utf-8")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(out), "--data", str(other)]) == 0
    printed = capsys.readouterr().out
    assert "unknown characters to validate on" in " ".join(printed.split())
    assert main(["generate", "--run", str(out), "--prompt", "Ωω", "--length", "3"]) == 0


def test_a_run_of_before_tokenizers_goes_on_with_the_ascii_table(text, tmp_path, capsys):
    """Version 0.1.0 wrote no tokenizer into its configs, and saved none."""
    text.write_text("The cat sat on the mat. The dog ran to the door.\n" * 60)
    out = tmp_path / "out"
    assert _compare(text, out, "--tokens", "ascii") == 0
    for name in ("config.json", "runs/standard-seed0/run.json"):
        assert "tokenizer" not in json.loads((out / name).read_text())["task"]
    run = out / "runs" / "standard-seed0"
    assert sorted(path.name for path in (run / "model").iterdir() if "token" in path.name) == []
    config, model = load_run(run)
    assert (config.task.tokenizer, model.config.vocab_size) == ("ascii", 96)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run)]) == 0
    assert "per byte" not in capsys.readouterr().out
    assert main(["generate", "--run", str(run), "--prompt", "The", "--length", "9"]) == 0
    assert len(capsys.readouterr().out) == 3 + 9 + 1
    assert _compare(text, out, "--tokens", "ascii") == 0
    assert _compare(text, out) == 1
    assert "task.tokenizer was 'ascii', is 'characters'" in capsys.readouterr().err


def test_a_text_with_another_vocabulary_does_not_continue_a_run(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert _compare(text, out) == 0
    text.write_text(TEXT + "Ω" * 200, encoding="utf-8")
    capsys.readouterr()
    assert _compare(text, out) == 1
    error = capsys.readouterr().err
    assert "holds another vocabulary than characters has now" in error
    assert error.count("\n") == 1
    assert _compare(text, out, "--overwrite") == 0


def test_the_tokenizer_of_a_run_serves_another(text, tmp_path):
    assert _compare(text, tmp_path / "one") == 0
    model = tmp_path / "one" / "runs" / "standard-seed0" / "model"
    text.write_text("доме\n" * 500, encoding="utf-8")
    assert _compare(text, tmp_path / "two", "--tokens", str(model)) == 0
    assert load_run(tmp_path / "two" / "runs" / "standard-seed0")[1].config.vocab_size == len(set(TEXT)) + 1


def test_retrofit_reads_the_tokens_of_a_run(text, tmp_path):
    out = tmp_path / "out"
    assert main(["train", "language", "--attention", "standard", "--data", str(text), "--out", str(out), *TINY]) == 0
    command = ["retrofit", "--ranks", "4,4", "--data", str(text), "--tune-steps", "0", "--batch-size", "2"]
    for name, model in (("run", out), ("model", out / "runs" / "standard-seed0" / "model")):
        assert main([*command, "--model", str(model), "--out", str(tmp_path / name)]) == 0
    (out / "runs" / "standard-seed0" / "model" / "structattn_tokenizer.json").unlink()
    assert main([*command, "--model", str(model), "--out", str(tmp_path / "none")]) == 1


def test_a_budget_by_its_former_name(text, tmp_path, capsys):
    arguments = ["train", "language", "--attention", "standard", "--data", str(text), *TINY[:-2]]
    for number, words in enumerate((["--tokens", "128"], ["--tokens=128"], ["--train-tokens", "128"])):
        assert main([*arguments, *words, "--tokens", "bytes", "--out", str(tmp_path / str(number))]) == 0
        note = capsys.readouterr().err
        assert ("a budget of tokens is now --train-tokens 128" in note) == (number < 2)
        config, _ = load_run(tmp_path / str(number) / "runs" / "standard-seed0")
        assert config.train.tokens == 128
        plain = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert plain["task"]["tokenizer"] == "bytes"


@pytest.mark.parametrize("kind", ["bytes", "characters", "pairs"])
def test_words_come_whole_and_lose_nothing(kind, tmp_path):
    byte_pairs("a").save(str(tmp_path / "tok.json"))
    made = {"bytes": ByteTokenizer(), "characters": CharacterTokenizer("aбв ")}
    tokenizer = made.get(kind) or read_tokenizer(str(tmp_path / "tok.json"))
    tokens = tokenizer.encode("бa日 𝄞 вaб").tolist()
    if kind == "bytes":
        tokens = [0xD0, 0xFF, 0x80, 0x80, 0x80, *tokens, 0xE6]
    words = _Words(tokenizer, tokenizer.encode("бa").tolist())
    pieces = [words.add(token) for token in tokens] + [words.rest()]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert pieces[-2] == ("" if kind == "bytes" else "б")
