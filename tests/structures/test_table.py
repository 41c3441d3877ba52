"""The table of costs, and the page that shows it."""

import contextlib
import io
import re
from pathlib import Path

from structattn.structures import BTT, Butterfly, LowRank, summary

PAGE = Path(__file__).parents[2] / "docs" / "structures.md"


def test_rows_are_the_properties_of_the_objects():
    structures = [LowRank(256, 256, 32, heads=8), BTT(256, 256), Butterfly(256)]
    table = summary(*structures)
    assert [row.structure for row in table.rows] == [s.describe() for s in structures]
    for row, s in zip(table.rows, structures, strict=True):
        assert (row.parameters, row.rank_bound) == (s.num_parameters, s.rank_bound)
        assert (row.feature_dim, row.flops) == (s.feature_dim, s.flops)


def test_plain_text_is_aligned_and_markdown_has_the_same_cells():
    table = summary(LowRank(256, 256, 32, heads=8), BTT(256, 256))
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-4:] == ["131,072", "32", "32", "262,144"]
    assert "| `LowRank(256, 256, rank=32, heads=8)` | 131,072 | 32 | 32 | 262,144 |" in table.markdown()


def test_the_page_shows_what_its_snippets_print():
    page = PAGE.read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(snippet, {})
    shown = re.search(r"```\n\n(\| structure .*?\|)\n\n", page, re.DOTALL).group(1)
    assert printed.getvalue().strip() == shown
