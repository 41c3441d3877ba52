"""Every page does what it shows: its Python runs in order, its commands parse, and the README stays short."""

import importlib.util
import re
import shlex
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.snippets import PAGES, ROOT, blocks_of, commands_of, snippets_of, text_of

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from structattn import Hierarchy
from structattn.integrations.transformers import get_hierarchy, set_hierarchy

VOCABULARY = 50
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def ids(*shape):
    return torch.randint(2, VOCABULARY, shape)


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **SPECIAL, initializer_range=0.2)).eval()


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL, initializer_range=0.2)).eval()


# --- what a page needs: names that its reader has already, files in the folder where it runs --------------------------


def nothing():
    return {}


def saved_llama():
    llama().save_pretrained("path/to/model")
    return {
        "tokenizer": lambda text, return_tensors: SimpleNamespace(input_ids=ids(1, 30)),
        "calibration_ids": ids(2, 40),
    }


def trained_gpt2():
    return {"model": gpt2(), "calibration_ids": ids(2, 40)}


def retrofitted():
    model = llama()
    set_hierarchy(model, "4|4v@w16")
    model.save_pretrained("runs/llama/models/8-24-32v-w-640-192")
    return trained_gpt2() | {"ids": ids(1, 20)}


def finished_comparison():
    from structattn.models import LanguageModel, LanguageModelConfig

    model = LanguageModel(LanguageModelConfig(layers=1, dim=16, heads=2, context_length=16, attention="mlr:4|4"))
    model.save_pretrained("runs/demo/runs/mlr-seed0/model")
    return {}


# --- what came of it -------------------------------------------------------------------------------------------------


def no_more(names):
    """Nothing to check beyond that it ran, and printed what its comments say."""


def levels_in_llama(names):
    assert names["text"].shape == (1, 50)
    assert round(names["share"], 2) == 0.28
    _levels_in_model(names)


def _levels_in_model(names):
    assert names["model"].config._attn_implementation == "structattn_mlr"
    assert torch.isfinite(names["model"](ids(2, 21)).logits).all()


def both_retrofitted(names):
    assert names["text"].shape == (1, 40)
    assert names["smaller"].config._attn_implementation == "structattn_mlr"
    _levels_in_model(names)


def chronos_forecasts(names):
    assert names["samples"].shape == (2, 2, 64)
    assert get_hierarchy(names["pipeline"].inner_model)["encoder"] == [Hierarchy.flat(64)] * 4


PYTHON = {
    "README.md": (nothing, no_more),
    "docs/chronos.md": (nothing, chronos_forecasts),
    "docs/compare.md": (finished_comparison, no_more),
    "docs/generation.md": (nothing, no_more),
    "docs/gpu.md": (nothing, no_more),
    "docs/index.md": (nothing, no_more),
    "docs/levels.md": (nothing, no_more),
    "docs/ranks.md": (nothing, no_more),
    "docs/retrofit.md": (retrofitted, both_retrofitted),
    "docs/structures.md": (nothing, no_more),
    "docs/transformers.md": (saved_llama, levels_in_llama),
    "docs/tutorial.md": (nothing, no_more),
}
"""For each page with Python: what makes the names and files that it needs, and what checks the names it leaves."""


ALONE = ("README.md", "docs/structures.md")
"""Pages whose snippets are each complete; on the others they follow one another."""


def test_every_page_with_python_is_run():
    assert [page for page in PAGES if snippets_of(page)] == sorted(PYTHON, key=PAGES.index)


@pytest.mark.parametrize("page", PYTHON)
def test_python_of_the_page(page, tmp_path, monkeypatch, capsys):
    if page == "docs/chronos.md":
        pytest.importorskip("chronos")
    monkeypatch.chdir(tmp_path)
    if page == "docs/tutorial.md":  # It caches a text. Other pages find the compiled kernel where it lies.
        monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "cache"))
    make, check = PYTHON[page]
    names = make()
    for number, snippet in enumerate(snippets_of(page), start=1):
        if page in ALONE:
            names = {}
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
        _said_is_printed(snippet, capsys.readouterr().out)
    check(names)


def _said_is_printed(snippet, printed):
    """Each comment after a `print` holds, in order, what was printed: numbers, `True`, text up to a colon or `…`."""
    at = 0
    for line in snippet.splitlines():
        said = re.match(r"print\(.*\)  # ([^:…]+)", line)
        if said:
            expected = said[1].strip()
            assert expected in printed[at:], f"{line!r}, but printed was {printed!r}"
            at = printed.index(expected, at) + len(expected)


def test_what_is_said_is_compared():
    _said_is_printed("print(1 / 7)  # 0.142…: a share\nprint(2)  # 2", "0.14285\n2\n")
    for printed in ("0.15\n2\n", "0.14285\n3\n"):
        with pytest.raises(AssertionError):
            _said_is_printed("print(1 / 7)  # 0.142…: a share\nprint(2)  # 2", printed)


# --- commands --------------------------------------------------------------------------------------------------------


def _structattn(words, monkeypatch):
    pytest.importorskip("tyro")
    from structattn.cli import main, shell

    if "--help" not in words:
        monkeypatch.setattr(shell, "run", lambda *_, **__: 0)
        assert main(words) == 0
        _attentions_exist(words)


def _paper(words, monkeypatch):
    pytest.importorskip("tyro")
    from paper.cli import main
    from structattn.cli import shell

    monkeypatch.setattr(shell, "run", lambda *_, **__: 0)
    assert main(words) == 0
    _attentions_exist(words)


def _attentions_exist(words):
    from structattn.layers import parse_attention

    for at, word in enumerate(words):
        if word in ("--attention", "--attentions"):
            for text in words[at + 1 :]:
                if text.startswith("--"):
                    break
                parse_attention(text)


def _python(words, monkeypatch):
    """A module of the repository, with the options that its source names; or a script."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    module, *options = words[1:]
    if module in ("structattn", "paper"):
        {"structattn": _structattn, "paper": _paper}[module](options, monkeypatch)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    if spec.origin.startswith(str(ROOT)):
        runs = Path(spec.origin).with_name("__main__.py") if spec.submodule_search_locations else Path(spec.origin)
        source = runs.read_text(encoding="utf-8")
        assert [each for each in options if each.startswith("--") and f'"{each}"' not in source] == []


def _make(words, monkeypatch):
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE)
    assert [word for word in words if "=" not in word and word not in targets] == []


def _pip(words, monkeypatch):
    table = text_of("pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", table, flags=re.MULTILINE))
    for word in words:
        for asked in re.findall(r"^\.\[(.*)\]$", word):
            assert set(asked.split(",")) <= extras


PROGRAMS = {"structattn": _structattn, "python": _python, "make": _make, "pip": _pip}


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_commands_of_the_page(page, monkeypatch):
    for command in commands_of(page):
        program, *words = shlex.split(command)
        assert program in PROGRAMS, f"{page}: no check for the command {command!r}"
        try:
            PROGRAMS[program](words, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{page}: {command!r} does not parse: {error}")


def test_a_renamed_option_is_seen(monkeypatch):
    with pytest.raises(SystemExit):
        _structattn(["compare", "language", "--attention-kinds", "mlr", "--out", "x"], monkeypatch)
    with pytest.raises(SystemExit):
        _paper(["widths"], monkeypatch)


def test_options_in_sentences_exist(capsys):
    """Options in backticks are ones that some command of the pages has."""
    pytest.importorskip("tyro")
    from paper.cli import main as paper
    from structattn.cli import main as structattn

    known = {"--nproc-per-node"}  # torchrun's
    commands = {tuple(takewhile(lambda word: word[0] != "-", shlex.split(text)[1:])) for text in _run_by("structattn")}
    studies = {
        tuple(takewhile(lambda word: word[0] != "-", shlex.split(text)[3:])) for text in _run_by("python -m paper")
    }
    for main, words in [(structattn, words) for words in commands] + [(paper, words) for words in studies]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
        said = {option for code in re.findall(r"`([^`]+)`", prose) for option in re.findall(r"--[a-z][a-z-]*", code)}
        assert {option for option in said if not _in_a_benchmark(option)} <= known, page


def _run_by(program):
    return [command for page in PAGES for command in commands_of(page) if command.startswith(program + " ")]


def _in_a_benchmark(option):
    return any(f'"{option}"' in path.read_text(encoding="utf-8") for path in ROOT.glob("benchmarks/**/*.py"))


def test_every_block_has_a_language():
    """A block that no test knows would stand unchecked; formulas are indented, not fenced."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", text_of(page), flags=re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh"}, page
        assert set(fences[1::2]) <= {""}, page


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    body = text_of("README.md").split("\n## Cite")[0]
    assert len(body.split()) <= 700


def test_sentences_of_the_readme_are_short():
    body = re.sub(r"```.*?```", "", text_of("README.md"), flags=re.DOTALL)
    body = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", body)
    paragraphs = [text for text in re.split(r"\n\s*\n|\n(?=[|#-])", body) if not text.startswith("|")]
    sentences = [sentence for text in paragraphs for sentence in re.split(r"(?<=[.?!:])\s+", text)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []


def test_the_readme_shows_all_three_ways_in():
    assert len(blocks_of("README.md", "python")) == 3


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """Pages of the site have theirs checked when it is built."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.split("#")[0]).is_file()] == []
