"""Define the hierarchy: levels, their dimensions, and the pairs they reach.

Symbols: level l = 1..L, rank r_l, prefix rank R_m = r_1 + … + r_m, value rank u_l, block size b_l or window w_l, sinks
s, depth m(i, j), gain c_m.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from structattn import checks
from structattn.drawing.pairs import draw_pair_widths, sampled_positions
from structattn.ops.hierarchy_checks import (
    checked_gains,
    checked_ranks,
    checked_reach,
    checked_sinks,
    checked_value_ranks,
    mean_gains,
)
from structattn.ops.hierarchy_text import integer, join, number, parse_ranks, parse_sizes, parse_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EVERYWHERE = 2**62
"""A position after any sequence."""


@dataclass(frozen=True, repr=False)
class Hierarchy:
    r"""Levels of attention: near pairs share more dimensions than far pairs.

    Each level reaches some pairs of positions, all of them pairs of the level before it. By block of `b_l` positions a
    level reaches the pairs within one block (arXiv 2509.07963, section 4). By window of `w_l` positions it reaches the
    pairs that are near; two levels by window are Distance-Adaptive Representation (arXiv 2606.18587)::

        block     i // b_l == j // b_l                  None is one block: all pairs
        window    |i - j| < w_l  or  j < s              None is all pairs

    By window, the first `s` tokens may be attention sinks (arXiv 2309.17453): every level reaches them as keys, at any
    distance, so that a query sees them at full width, also beyond a finite `w_1`.

    The depth `m(i, j)` of a pair is the number of levels that reach it. With `R_m = r_1 + … + r_m`::

        score(i, j) = scale · c_m · Σ_{d < R_m} q_i[d] · k_j[d]
        out_i[d]    = Σ_j p(i, j) · v_j[d]              over the pairs that the level of value dimension d reaches

    Args:
        ranks: `r_1 … r_L`, the number of dimensions of `q` and `k` that each level owns, in order.
        block_sizes: `b_1 … b_L`; `b_1` is `None` (the whole sequence), and each later one divides the one before it.
        gains: `c_1 … c_L`, the factor on the score of a pair at depth `m`; `"mean"` is `1/m`, `None` is 1 everywhere.
        windows: `w_1 … w_L` in place of `block_sizes`, strictly shrinking. Only `w_1` may be `None`; pairs outside a
            finite `w_1` are invisible, so that one level with a window is sliding-window attention.
        value_ranks: `u_1 … u_L`, the number of dimensions of `v` that each level owns, in order, which sum to its
            width; a level may own none. By default level 1 owns all.
        sinks: `s`, the number of first tokens that all levels reach; below the smallest window.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    ranks: tuple[int, ...]
    block_sizes: tuple[int | None, ...] | None
    gains: tuple[float, ...]
    windows: tuple[int | None, ...] | None
    value_ranks: tuple[int, ...] | None
    sinks: int
    if TYPE_CHECKING:
        text: str  # what `str` returns; no field

    def __init__(
        self,
        ranks: Iterable[int],
        block_sizes: Iterable[int | None] | None = None,
        gains: Iterable[float] | Literal["mean"] | None = None,
        *,
        windows: Iterable[int | None] | None = None,
        value_ranks: Iterable[int] | None = None,
        sinks: int = 0,
    ) -> None:
        ranks = checked_ranks(ranks)
        block_sizes, windows = checked_reach(block_sizes, windows, len(ranks))
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "block_sizes", block_sizes)
        object.__setattr__(self, "gains", checked_gains(gains, len(ranks)))
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "value_ranks", checked_value_ranks(value_ranks, len(ranks)))
        object.__setattr__(self, "sinks", checked_sinks(sinks, windows))
        object.__setattr__(self, "text", self._as_text())  # made once: every call reads it

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, also an older one without sinks or text."""
        self.__dict__.update({"sinks": 0} | state)
        if "text" not in state:
            object.__setattr__(self, "text", self._as_text())

    @classmethod
    def dyadic(
        cls,
        ranks: Iterable[int],
        context_length: int,
        gains: Iterable[float] | Literal["mean"] | None = None,
        *,
        value_ranks: Iterable[int] | None = None,
    ) -> Hierarchy:
        """Return a hierarchy whose blocks halve from `context_length`.

        Level 1 has one block, `None`. With `C = context_length`, the smallest block is `C / 2^(L-1)`, rounded up; each
        coarser one is twice the next finer. Blocks therefore nest, and two blocks of level 2 cover the context. Where
        `C` is no multiple of `2^(L-1)`, they are longer than `C/2, C/4, …`.
        """
        ranks = checked_ranks(ranks)
        context_length = checks.positive_int("context_length", context_length)
        return cls(ranks, _halving_blocks(len(ranks), context_length), gains, value_ranks=value_ranks)

    @classmethod
    def flat(cls, rank: int) -> Hierarchy:
        """Return the hierarchy of one level: standard attention of head rank `rank`."""
        return cls((rank,))

    @classmethod
    def parse(cls, text: str) -> Hierarchy:
        """Return the hierarchy that `text` describes, the inverse of `str`.

        `RANKS[vVALUE_RANKS][@REACH][/GAINS]`. Ranks are `32|8|4` or `8x4` (four levels of 8); a bare `v` gives values
        the same ranks. The reach is a context length (`@1024`, blocks that halve as in `dyadic`), block sizes
        (`@*|96|48`) or windows (`@w*|512|128`; level 1 may be left out, `@w512|128`, and then sees everything). Sinks
        follow the windows (`@w512|128+4`). Gains are `/mean` or numbers (`/1|0.5|0.25`), by default 1. A comma serves
        wherever a bar does.
        """
        if not isinstance(text, str):
            raise TypeError(f"a hierarchy's text form must be a string, got {text!r} ({type(text).__name__})")
        body, _, gains_text = text.replace(",", "|").partition("/")
        all_ranks, _, reach = body.partition("@")
        ranks_text, has_values, values_text = all_ranks.partition("v")
        ranks = parse_ranks(ranks_text)
        value_ranks = (parse_ranks(values_text) if values_text else ranks) if has_values else None
        gains: Any = None
        if gains_text:
            gains = "mean" if gains_text == "mean" else [number(part, text) for part in gains_text.split("|")]
        if not reach and len(ranks) > 1:
            raise ValueError(f"hierarchy {text!r} has {len(ranks)} levels and needs blocks or windows: "
                             f"'{all_ranks}@1024', '{all_ranks}@w128'")  # fmt: skip
        reach, has_sinks, sinks_text = reach.partition("+")
        if reach.startswith("w"):
            windows, sinks = parse_windows(reach[1:], len(ranks)), integer(sinks_text, text) if has_sinks else 0
            return cls(ranks, None, gains, windows=windows, value_ranks=value_ranks, sinks=sinks)
        if has_sinks:
            raise ValueError(f"sinks follow windows, as in '64v@w192+4', got {text!r}")
        if reach and "|" not in reach and reach != "*":
            return cls.dyadic(ranks, integer(reach, text), gains, value_ranks=value_ranks)
        return cls(ranks, parse_sizes(reach or "*"), gains, value_ranks=value_ranks)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return self.text

    def _as_text(self) -> str:
        text = join(self.ranks)
        if self.value_ranks is not None:
            text += "v" if self.value_ranks == self.ranks else "v" + join(self.value_ranks)
        if self.windows is not None:
            text += "@w" + join(self.windows) + (f"+{self.sinks}" if self.sinks else "")
        elif self.levels > 1:
            context = 2 * (self.sizes[1] or 0)
            halving = _halving_blocks(self.levels, context) == self.sizes
            text += f"@{context}" if halving else "@" + join(self.sizes)
        if self.gains == mean_gains(self.levels):
            return text if self.levels == 1 else text + "/mean"
        if any(gain != 1.0 for gain in self.gains):
            text += "/" + "|".join(map(repr, self.gains))
        return text

    def __repr__(self) -> str:
        """Return the constructor's call, without fields that are None or no sinks."""
        fields = ("ranks", "block_sizes", "windows", "value_ranks", "gains", "sinks")
        given = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) not in (None, 0)]
        return f"Hierarchy({', '.join(given)})"

    @property
    def levels(self) -> int:
        """Number of levels, L."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """Head rank `r = Σ r_l`, the width of `q` and `k`."""
        return sum(self.ranks)

    @property
    def prefix_ranks(self) -> tuple[int, ...]:
        """Width of the dot product at each depth, `R_1 … R_L`."""
        return tuple(itertools.accumulate(self.ranks))

    @property
    def by_window(self) -> bool:
        """True if levels reach by window, False if by block."""
        return self.windows is not None

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Block sizes or windows."""
        return self.windows if self.windows is not None else self.block_sizes or ()

    def value_widths(self, value_dim: int | None = None) -> tuple[int, ...]:
        """Return each level's value dimensions, `u_1 … u_L`.

        Args:
            value_dim: `dv`. It may be left out where the hierarchy has value ranks.

        Raises:
            ValueError: `value_dim` is missing, or is not the sum of the value ranks.
        """
        if self.value_ranks is None:
            if value_dim is None:
                raise ValueError("value_dim must be given: the hierarchy has no value_ranks")
            return (value_dim, *(0,) * (self.levels - 1))
        if value_dim is not None and value_dim != sum(self.value_ranks):
            raise ValueError(
                f"value_ranks must sum to the values' width {value_dim}, "
                f"got {join(self.value_ranks)} = {sum(self.value_ranks)}"
            )
        return self.value_ranks

    @overload
    def reaches(self, level: int, i: int, j: int) -> bool: ...
    @overload
    def reaches(self, level: int, i: torch.Tensor, j: torch.Tensor | int) -> torch.Tensor: ...
    @overload
    def reaches(self, level: int, i: int, j: torch.Tensor) -> torch.Tensor: ...
    def reaches(self, level: int, i: Any, j: Any) -> bool | torch.Tensor:
        """Return True where a level reaches a pair of positions.

        `level` counts from 0. Positions `i` and `j` are integers, or integer tensors that broadcast.
        """
        size = self.sizes[level]
        if self.sinks:
            return (abs(i - j) < (size or _EVERYWHERE)) | (j < self.sinks)
        if self.by_window or size is None:
            return abs(i - j) < (size or _EVERYWHERE)
        return i // size == j // size

    @overload
    def depth(self, i: int, j: int) -> int: ...
    @overload
    def depth(self, i: torch.Tensor, j: torch.Tensor | int) -> torch.Tensor: ...
    @overload
    def depth(self, i: int, j: torch.Tensor) -> torch.Tensor: ...
    def depth(self, i: Any, j: Any) -> int | torch.Tensor:
        """Return the depth `m(i, j)`, 1 to L, or 0 if invisible.

        Positions `i` and `j` are integers, or integer tensors that broadcast.
        """
        depth: Any = 0 * (i + j)
        for level in range(self.levels):
            depth = depth + self.reaches(level, i, j)
        return depth

    def within(self, window: int) -> Hierarchy:
        """Return the same hierarchy with pairs outside a window invisible.

        Sinks stay visible. Levels that reach all pairs with `|i - j| < window` become one, with the gain of their last.

        Raises:
            ValueError: several levels by block, `window` is not positive, or not above the sinks.
        """
        checks.positive_int("window", window)
        if self.levels > 1 and not self.by_window:
            raise ValueError(f"levels by block cannot lie within a window: use windows in place of blocks, got {self}")
        whole = sum(size is None or size >= window for size in self.sizes)
        if not whole:
            return self
        ranks, windows = _join_first(self.ranks, whole), (window, *self.sizes[whole:])
        value_ranks = None if self.value_ranks is None else _join_first(self.value_ranks, whole)
        gains = self.gains[whole - 1 :]
        return Hierarchy(ranks, gains=gains, windows=windows, value_ranks=value_ranks, sinks=self.sinks)

    def with_sinks(self, count: int) -> Hierarchy:
        """Return the same levels with so many sinks; ValueError unless they are below the smallest window."""
        return self if count == self.sinks else _with_sinks(self, count)

    def without_sinks(self) -> Hierarchy:
        """Return the same levels, without sinks."""
        return self.with_sinks(0)

    def span(self, level: int, i: Any) -> tuple[Any, Any]:
        """Return start and stop of what a level reaches from `i`.

        `i` is an integer or an array. The first may be negative, and the last lies after any sequence where the level
        reaches everything. Sinks are not counted.
        """
        size = self.sizes[level]
        if size is None:
            return 0 * i, 0 * i + _EVERYWHERE
        return (i - size + 1, i + size) if self.by_window else (i // size * size, i // size * size + size)

    def live(self, level: int, length: int) -> int:
        """Return how many of `length` tokens a level still keeps.

        No later query shares the level with the others. By window it keeps `min(T, w_l + s)` tokens, by block `T mod
        b_l`, or `b_l` where that is 0: a full block stays until the next token, so that one token can be taken back.
        """
        size = self.sizes[level]
        if size is None or length == 0:
            return length
        return min(length, size + self.sinks) if self.by_window else length % size or size

    def key_numbers(self, length: int) -> int:
        """Return the cached key numbers of one head, `Σ_l r_l · live(l, T)`."""
        return self._numbers(self.ranks, length)

    def value_numbers(self, length: int, value_dim: int | None = None) -> int:
        """Return the cached value numbers of one head, `Σ_l u_l · live(l, T)`.

        `value_dim` is that of `value_widths`.
        """
        return self._numbers(self.value_widths(value_dim), length)

    def cache_numbers(self, length: int, value_dim: int | None = None) -> int:
        """Return the cached numbers of one head after `length` tokens."""
        return self.key_numbers(length) + self.value_numbers(length, value_dim)

    def _numbers(self, widths: Iterable[int], length: int) -> int:
        length = length and checks.positive_int("length", length)
        return sum(width * self.live(level, length) for level, width in enumerate(widths))

    def pair_counts(self, query_length: int, key_length: int, *, is_causal: bool, query_offset: int = 0) -> list[int]:
        """Return the number of visible pairs that each level reaches."""
        i = np.arange(query_offset, query_offset + query_length)
        visible_end = np.minimum(i + 1, key_length) if is_causal else np.full_like(i, key_length)
        counts = []
        for level in range(self.levels):
            start, stop = self.span(level, i)
            start, stop = np.maximum(start, 0), np.minimum(stop, visible_end)
            sinks = np.minimum(np.minimum(self.sinks, visible_end), start)  # those before the level's own span
            counts.append(int((np.maximum(stop - start, 0) + sinks).sum()))
        return counts

    def score_flops(
        self, query_length: int, key_length: int | None = None, *, is_causal: bool = False, query_offset: int = 0
    ) -> int:
        """Return the FLOPs of one head's scores, `2 · Σ_l r_l · P_l`.

        `P_l` is the number of visible pairs that level `l` reaches.
        """
        return self._pair_flops(self.ranks, query_length, key_length, is_causal, query_offset)

    def mixing_flops(
        self,
        query_length: int,
        key_length: int | None = None,
        *,
        value_dim: int | None = None,
        is_causal: bool = False,
        query_offset: int = 0,
    ) -> int:
        """Return the FLOPs of mixing one head's values, `2 · Σ_l u_l · P_l`.

        `value_dim` is that of `value_widths`, and `P_l` as in `score_flops`.
        """
        return self._pair_flops(self.value_widths(value_dim), query_length, key_length, is_causal, query_offset)

    def _pair_flops(
        self, widths: Iterable[int], query_length: int, key_length: int | None, is_causal: bool, query_offset: int
    ) -> int:
        key_length = query_length if key_length is None else key_length
        counts = self.pair_counts(query_length, key_length, is_causal=is_causal, query_offset=query_offset)
        return 2 * sum(width * count for width, count in zip(widths, counts, strict=True))

    def plot(
        self, length: int | None = None, ax: Axes | None = None, *, of: Literal["scores", "values"] = "scores"
    ) -> Axes:
        """Draw the dimensions that every pair shares.

        Args:
            length: positions to draw; by default twice the largest finite block or window, or 64 without one.
            ax: matplotlib axes; by default those of a new figure.
            of: `"scores"` draws `R_m`, the width of the dot product; `"values"` draws the value dimensions mixed.

        Raises:
            ImportError: without matplotlib, naming the extra that brings it.
            ValueError: values are asked for and the hierarchy has no value ranks.
        """
        checks.one_of("of", of, ("scores", "values"))
        if of == "values" and self.value_ranks is None:
            raise ValueError(f"of='values' needs a hierarchy with value_ranks, got {self}")
        widths = (0, *(self.prefix_ranks if of == "scores" else itertools.accumulate(self.value_widths())))
        pyplot = checks.require("matplotlib.pyplot", "plot")
        length = length or 2 * max((size for size in self.sizes if size), default=32)
        ax = ax or pyplot.subplots(figsize=(4.5, 4))[1]
        at = torch.from_numpy(sampled_positions(length))
        width = torch.tensor(widths)[self.depth(at[:, None], at[None, :])].numpy()
        image = draw_pair_widths(ax, np.ma.masked_equal(width, 0), length)
        label = "dimensions of the dot product" if of == "scores" else "value dimensions"
        ax.figure.colorbar(image, ax=ax, label=label)
        ax.set(xlabel="key position", ylabel="query position", title=f"levels {self}")
        return ax


@functools.lru_cache(maxsize=256)  # every call asks for it
def _with_sinks(hierarchy: Hierarchy, count: int) -> Hierarchy:
    reach: Any = {"block_sizes": hierarchy.block_sizes, "windows": hierarchy.windows}
    return Hierarchy(hierarchy.ranks, gains=hierarchy.gains, value_ranks=hierarchy.value_ranks, sinks=count, **reach)


def _join_first(widths: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (sum(widths[:count]), *widths[count:])


def _halving_blocks(levels: int, context_length: int) -> tuple[int | None, ...]:
    """Return blocks that halve from `context_length`, see `Hierarchy.dyadic`."""
    smallest = -(-context_length // 2 ** (levels - 1))
    return (None, *(smallest * 2**power for power in reversed(range(levels - 1))))
