"""The README's Python snippets, run as they are written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, capsys):
    exec(compile(SNIPPETS[number], f"README snippet {number + 1}", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*#\s*([\d. ]*\d)", SNIPPETS[number]):
        assert expected in printed


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
