"""Hold the timings to the speed goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import machine
from benchmarks.gpu.attention import FLAT, FLEX, GRAPH, RIVALS, WINDOWS
from benchmarks.gpu.models import MLR, NEAR, STANDARD
from benchmarks.output import Row


@dataclass(frozen=True)
class Goal:
    """A number that is measured and what it must be."""

    text: str
    measure: Callable[[list[Row]], float | None]
    """Returns the number from the rows; None if a part of it is missing."""
    least: float | None = None
    most: float | None = None

    def verdict(self, rows: list[Row]) -> Row:
        """Return the goal, the measured value, and whether it is met.

        The last is None where that is not known.
        """
        measured = self.measure(rows)
        met = None
        if measured is not None:
            met = (self.least is None or measured >= self.least) and (self.most is None or measured <= self.most)
        return {"goal": self.text, "least": self.least, "most": self.most, "measured": measured, "met": met}


def verdicts(rows: list[Row]) -> list[Row]:
    """Return the verdict on every goal."""
    return [goal.verdict(rows) for goal in GOALS]


def speed_over(
    variant: str, rivals: Iterable[str], operation: str, length: int, rank: int, batch: int | None = None
) -> Callable[[list[Row]], float | None]:
    """Return a measure: the least time of the rivals over the variant's, in one case."""

    def measure(rows: list[Row]) -> float | None:
        key = (operation, length, rank, batch)
        mine = [row for row in rows if tuple(row.get(name) for name in ("operation", "length", "rank", "rows")) == key]
        return _ratio(medians(mine), variant, rivals)

    return measure


def medians(rows: list[Row]) -> dict[str, float]:
    """Return the median of each variant that was timed."""
    return {row["variant"]: machine.median(row["samples_ms"]) for row in rows if "samples_ms" in row}


def _ratio(times: dict[str, float], variant: str, rivals: Iterable[str]) -> float | None:
    best = min((times[rival] for rival in rivals if rival in times), default=None)
    return None if best is None or variant not in times else best / times[variant]


def _training_step(rows: list[Row]) -> float | None:
    return _ratio(medians([row for row in rows if row.get("kind") == "training step"]), MLR, [STANDARD])


def _cache_share(rows: list[Row]) -> float | None:
    live = {row["variant"]: row["live_bytes"] for row in rows if "live_bytes" in row}
    return live[NEAR] / live[STANDARD] if {NEAR, STANDARD} <= live.keys() else None


def _breaks(rows: list[Row]) -> float | None:
    found = [row["graph_breaks"] for row in rows if row.get("variant") == f"{MLR}, compiled" and "graph_breaks" in row]
    return float(len(found[0])) if found else None


def _waits(rows: list[Row]) -> float | None:
    found: list[dict[str, Any]] = [
        row["waits"] for row in rows if "waits" in row and not row["variant"].startswith(STANDARD)
    ]
    return float(max(found[0].values())) if found else None


def _graph(rows: list[Row]) -> float | None:
    found = [row for row in rows if row.get("variant") == f"{NEAR}, graph" and row.get("kind") == "decoding"]
    return float("samples_ms" in found[0]) if found else None


GRAPHS = tuple(rival + GRAPH for rival in RIVALS)
GOALS = [
    *(
        Goal(
            f"one level at r = {rank}, {operation}, 8k: speed over FlexAttention",
            speed_over(FLAT, [FLEX], operation, 8192, rank),
            least=0.9,
        )
        for rank in (64, 128)
        for operation in ("forward", "forward + backward")
    ),
    *(
        Goal(
            f"windows 1024 and 256 at r = dv = 128, {operation}, {length // 1024}k: speed over the best",
            speed_over(WINDOWS, RIVALS, operation, length, 128),
            least=least,
        )
        for length in (8192, 32_768)
        for operation, least in (("forward", 1.3), ("forward + backward", 1.4))
    ),
    *(
        Goal(
            f"decode at {length // 1024}k keys, batch {batch}, 32:8 heads: speed over the best, CUDA graphs",
            speed_over(WINDOWS + GRAPH, GRAPHS, "decode", length, 128, batch),
            least=2.5,
        )
        for length in (32_768, 131_072)
        for batch in (1, 16)
    ),
    Goal("live cache bytes at 32k: share of the standard cache", _cache_share, most=0.28),
    Goal("training step, 6 layers, width 768, T = 4k: speed over SDPA", _training_step, least=1.0),
    Goal("torch.compile of a whole model: breaks of its graph", _breaks, most=0.0),
    Goal("decoding in a model: waits for the card per token", _waits, most=0.0),
    Goal("decoding in a model: runs as a CUDA graph with equal logits (1 or 0)", _graph, least=1.0),
]
