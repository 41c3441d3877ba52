"""The Python snippets of the README and of pages that need no trained model, run as they are written."""

import re

import pytest

from snippets import snippets_of

README = snippets_of("README.md")


@pytest.mark.parametrize("number", range(len(README)))
def test_snippet(number, capsys):
    exec(compile(README[number], f"README snippet {number + 1}", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*#\s*([\d. ]*\d)", README[number]):
        assert expected in printed


def test_there_are_snippets():
    assert len(README) >= 2


def test_page_on_generation(capsys):
    """Its snippets follow one another; each says `True` of what it claims."""
    names = {}
    snippets = snippets_of("docs/generation.md")
    for snippet in snippets:
        exec(compile(snippet, "docs/generation.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(snippets) == 2
    assert all(line.startswith("True") for line in lines)
