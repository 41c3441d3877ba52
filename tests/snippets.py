"""The Python snippets of README and docs, as they are written."""

import re
from pathlib import Path

from structattn.models.transformers_internals import CACHE

ROOT = Path(__file__).parents[1]


def snippets_of(page):
    """Return a page's snippets; models of transformers before 5.24 take the cache by another name than the page's."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [snippet.replace("cache=make_cache(", f"{CACHE}=make_cache(") for snippet in found]
