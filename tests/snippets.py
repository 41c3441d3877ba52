"""Fenced blocks of the README and the pages of `docs`."""

import re
from pathlib import Path

from structattn.models.transformers_internals import CACHE

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page, language):
    """Return the page's blocks fenced as `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def snippets_of(page):
    """Return the page's Python for the installed version of transformers.

    Before 5.24 the cache's argument has another name than on the pages.
    """
    return [snippet.replace("cache=make_cache(", f"{CACHE}=make_cache(") for snippet in blocks_of(page, "python")]


def commands_of(page):
    """Return the commands in the page's shell blocks and tables: continued lines joined, comments dropped."""
    lines = "\n".join(blocks_of(page, "sh")).replace("\\\n", " ").splitlines()
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    lines += re.findall(r"`((?:structattn|python|make|pip) [^`]+)`", "\n".join(rows))
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]
