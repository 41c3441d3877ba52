"""Bound what a GPU gains from levels: `python -m benchmarks.gpu.bounds` prints the tables of `docs/gpu.md`.

Rates of an H100 SXM. Products: 989.4 TFLOP/s in bfloat16 without sparsity (NVIDIA H100 data sheet). Exponentials: 16 of
`exp2` per multiprocessor and clock (CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute
capability 9.0), 132 multiprocessors, 1.83 GHz, the boost clock at which the data sheet's rate of products holds.
FlashAttention-3 (arXiv 2407.08608) counts the same 3.9 T/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.output import table
from structattn import Hierarchy

PRODUCTS = 989.4e12
"""FLOP/s."""
EXPONENTIALS = 16 * 132 * 1.83e9
"""Results per second."""
PASSES = {"forward": (4, 1), "forward + backward": (14, 2)}
"""FLOPs per score and dimension, and exponentials per score: backward has five products and takes the exponential
again."""
WIDTHS = (64, 128, 256)
STRUCTURES = ("16|16|32v@w*|1024|256", "32|32|64v@w*|1024|256")
"""Levels by window in keys and values, at head widths of 64 and 128."""
SHARES = (1 / 2, 1 / 4)
"""Shares of the dimensions that far pairs keep."""


@dataclass(frozen=True)
class Time:
    """Seconds that scores take in the two units that limit attention."""

    products: float
    exponentials: float

    @property
    def in_turn(self) -> float:
        """Seconds if the units work one after the other."""
        return self.products + self.exponentials

    @property
    def at_once(self) -> float:
        """Seconds if one works while the other does."""
        return max(self.products, self.exponentials)


def time_of(scores: float, dimensions: float, passes: str) -> Time:
    """Return the time of so many scores and dimensions.

    `dimensions` are over all scores, the mean of `r` and `dv`.
    """
    flops, exponentials = PASSES[passes]
    return Time(flops * dimensions / PRODUCTS, exponentials * scores / EXPONENTIALS)


def gain(whole: Time, cut: Time) -> tuple[float, float]:
    """Return the speed-up of `cut` over `whole`, units in turn and at once."""
    return whole.in_turn / cut.in_turn, whole.at_once / cut.at_once


def width_table() -> list[str]:
    """Return the table of one score by head width: its time, and the gain of shorter prefixes."""
    rows = []
    for passes in PASSES:
        for width in WIDTHS:
            whole = time_of(1, width, passes)
            gains = [gain(whole, time_of(1, width * share, passes)) for share in SHARES]
            times = [f"{1e12 * whole.products:.2f}", f"{1e12 * whole.exponentials:.2f}"]
            ratio = f"{whole.products / whole.exponentials:.1f}"
            rows.append([passes, str(width), *times, ratio, *(f"{first:.2f} / {last:.2f}" for first, last in gains)])
    header = ["pass", "head width", "products, ps", "exponential, ps", "ratio", "half the dimensions", "a quarter"]
    return table(header, rows)


def structure_table() -> list[str]:
    """Return the table of structures: the most that they gain, and their share of the cache."""
    rows = []
    for text in STRUCTURES:
        levels = Hierarchy.parse(text)
        for length in (8192, 32_768):
            scores = length * (length + 1) / 2
            cut = levels.score_flops(length, is_causal=True) / 2
            gains = [
                gain(time_of(scores, scores * levels.rank, passes), time_of(scores, cut, passes)) for passes in PASSES
            ]
            share = levels.cache_numbers(length, levels.rank) / (2 * levels.rank * length)
            cells = [f"{first:.2f} / {last:.2f}" for first, last in gains]
            rows.append([f"`{text}`", f"{length:,}", *cells, f"{share:.1%}", f"{1 / share:.1f}"])
    return table(["levels", "tokens", "forward", "forward + backward", "cache", "decode"], rows)


def tables() -> dict[str, list[str]]:
    """Return the tables of the page, by the name of their place."""
    return {"by head width": width_table(), "by structure": structure_table()}


if __name__ == "__main__":
    for name, lines in tables().items():
        print(name, *lines, "", sep="\n")
