"""Results of a study of smaller caches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structattn.comparison import files


@dataclass(frozen=True)
class TextLoss:
    """Losses on one text."""

    text: str
    loss: float
    """Nats per token, over every token but the first of each window."""

    parts: tuple[float, ...]
    """The same over each quarter of the window, first quarter first."""

    tokens_per_word: float
    """Tokens of the evaluated windows per word, where words are what white space separates."""

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word."""
        return math.exp(self.loss * self.tokens_per_word)


@dataclass(frozen=True)
class CacheRow:
    """Measurement of one method."""

    kind: str
    """`standard`, `levels`, `by layer`, `rounded`, `window` or `uniform`."""

    name: str
    share: float
    """Bits of the cache at the evaluated length, as a share of standard attention's in 16 bits."""

    untuned: tuple[TextLoss, ...]
    """Losses on each text before tuning; empty for a rounded cache of tuned levels."""

    tuned: tuple[TextLoss, ...] = ()
    """Losses after tuning; empty without."""

    tuning_tokens: int = 0
    tuning_seconds: float = 0.0

    @property
    def best(self) -> tuple[TextLoss, ...]:
        """Losses after tuning, where there was one."""
        return self.tuned or self.untuned


@dataclass(frozen=True)
class CacheResults:
    """Results of a study."""

    model: str
    length: int
    tune_steps: int
    rows: tuple[CacheRow, ...] = field(default=())
    """Standard attention first."""

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CacheResults:
        """Return the results that `save` wrote."""
        return cls.from_dict(files.read_json(folder / "results.json"))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> CacheResults:
        """Return the results whose fields are given as JSON has them; other fields are ignored."""
        rows = tuple(_row(row) for row in plain["rows"])
        return cls(plain["model"], plain["length"], plain["tune_steps"], rows)

    @property
    def standard(self) -> CacheRow:
        """The model as it was."""
        return self.rows[0]


def _row(plain: dict[str, Any]) -> CacheRow:
    losses = {
        name: tuple(TextLoss(**each | {"parts": tuple(each["parts"])}) for each in plain[name])
        for name in ("untuned", "tuned")
    }
    return CacheRow(**plain | losses)
