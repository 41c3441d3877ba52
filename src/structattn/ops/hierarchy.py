"""Define the hierarchy: levels, the dimensions each owns, and its blocks.

Symbols: level l = 1..L, level rank r_l, prefix rank R_m = r_1 + … + r_m, block size b_l, depth m(i, j), gain c_m.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from structattn import checks
from structattn.drawing.pairs import draw_pair_widths, sampled_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Hierarchy:
    r"""Describe the levels of an MLR attention score (arXiv 2509.07963, section 4).

    Positions are absolute. A pair of positions shares level `l` when both lie in the same block of `b_l` positions. For
    `l = 1`, `b_1` is None: one block, so every pair shares it. The depth of a pair is the number of levels it shares::

        m(i, j)     = max{ l : i // b_l == j // b_l }                     at least 1
        score(i, j) = scale · c_m · Σ_{d < R_m} q_i[d] · k_j[d]           with m = m(i, j), R_m = r_1 + … + r_m

    Args:
        ranks: `r_1 … r_L`, the number of dimensions of `q` and `k` that each level owns, in order.
        block_sizes: `b_1 … b_L`; `b_1` is `None` (the whole sequence), and each later one divides the one before it.
        gains: `c_1 … c_L`, the factor on the score of a pair at depth `m`; `"mean"` is `1/m`, `None` is 1 everywhere.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    ranks: tuple[int, ...]
    block_sizes: tuple[int | None, ...]
    gains: tuple[float, ...]

    def __init__(
        self,
        ranks: Iterable[int],
        block_sizes: Iterable[int | None],
        gains: Iterable[float] | Literal["mean"] | None = None,
    ) -> None:
        ranks = _check_ranks(ranks)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "block_sizes", _check_block_sizes(block_sizes, len(ranks)))
        object.__setattr__(self, "gains", _check_gains(gains, len(ranks)))

    @classmethod
    def dyadic(
        cls,
        ranks: Iterable[int],
        context_length: int,
        gains: Iterable[float] | Literal["mean"] | None = None,
    ) -> Hierarchy:
        """Return a hierarchy whose blocks halve from a context of C.

        Blocks are `None, C/2, C/4, …` tokens. The smallest block is `ceil(C / 2^(L-1))` and each coarser one doubles
        it. Blocks therefore nest, and two level-2 blocks cover the context.
        """
        ranks = _check_ranks(ranks)
        context_length = checks.positive_int("context_length", context_length)
        smallest = -(-context_length // 2 ** (len(ranks) - 1))
        finite = [smallest * 2**power for power in reversed(range(len(ranks) - 1))]
        return cls(ranks, (None, *finite), gains)

    @classmethod
    def flat(cls, rank: int) -> Hierarchy:
        """Return the hierarchy of one level: standard attention of head rank `rank`."""
        return cls((rank,), (None,))

    @classmethod
    def parse(cls, text: str) -> Hierarchy:
        """Return the hierarchy that `text` describes, the inverse of `str`.

        `RANKS[@BLOCKS][/GAINS]`. Ranks are `32|8|4` or `8x4` (four levels of 8). Blocks are a context length (`@1024`,
        halving as in `dyadic`) or all of them (`@*|96|48`). Gains are `/mean` or numbers (`/1|0.5|0.25`), by default 1.
        A comma serves wherever a bar does.
        """
        if not isinstance(text, str):
            raise TypeError(f"a hierarchy's text form must be a string, got {text!r} ({type(text).__name__})")
        body, _, gains_text = text.replace(",", "|").partition("/")
        ranks_text, _, blocks_text = body.partition("@")
        ranks = parse_ranks(ranks_text)
        gains: Any = None
        if gains_text:
            gains = "mean" if gains_text == "mean" else [_number(part, text) for part in gains_text.split("|")]
        if not blocks_text and len(ranks) > 1:
            raise ValueError(f"hierarchy {text!r} has {len(ranks)} levels and needs blocks: '{ranks_text}@1024'")
        if blocks_text and "|" not in blocks_text and blocks_text != "*":
            return cls.dyadic(ranks, _integer(blocks_text, text), gains)
        return cls(ranks, parse_block_sizes(blocks_text or "*"), gains)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        text = "|".join(map(str, self.ranks))
        if self.levels > 1:
            context = 2 * (self.block_sizes[1] or 0)
            dyadic = Hierarchy.dyadic(self.ranks, context).block_sizes == self.block_sizes
            text += f"@{context}" if dyadic else "@" + "|".join("*" if b is None else str(b) for b in self.block_sizes)
        if self.gains == _mean_gains(self.levels):
            return text if self.levels == 1 else text + "/mean"
        if any(gain != 1.0 for gain in self.gains):
            text += "/" + "|".join(map(repr, self.gains))
        return text

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
        """`R_1 … R_L`: the width of the dot product of a pair at each depth."""
        return tuple(itertools.accumulate(self.ranks))

    @overload
    def depth(self, i: int, j: int) -> int: ...
    @overload
    def depth(self, i: torch.Tensor, j: torch.Tensor | int) -> torch.Tensor: ...
    @overload
    def depth(self, i: int, j: torch.Tensor) -> torch.Tensor: ...
    def depth(self, i: int | torch.Tensor, j: int | torch.Tensor) -> int | torch.Tensor:
        """Return the depth `m(i, j)`, in 1..L.

        Positions `i` and `j` are integers, or integer tensors that broadcast.
        """
        depth: Any = 1 + 0 * (i + j)
        for size in self.block_sizes:
            depth = depth + (size is not None and i // size == j // size)
        return depth

    def key_numbers(self, length: int) -> int:
        """Return the cached key numbers of one head after `length` tokens.

        Level 1 keeps all `T = length` keys. Level `l >= 2` keeps only the current block, `T mod b_l` (or `b_l`) keys,
        because no later query shares the level with an earlier block. In numbers:
        `T·r_1 + Σ_{l≥2} r_l · (T mod b_l or b_l)`.
        """
        if length == 0:
            return 0
        length = checks.positive_int("length", length)
        finite = zip(self.ranks[1:], self.block_sizes[1:], strict=True)
        return length * self.ranks[0] + sum(rank * (length % size or size) for rank, size in finite if size)

    def pair_counts(self, query_length: int, key_length: int, *, is_causal: bool, query_offset: int = 0) -> list[int]:
        """Return the number of visible pairs that share each level.

        Query `t` has position `query_offset + t`.
        """
        whole = max(query_offset + query_length, key_length)
        i = np.arange(query_offset, query_offset + query_length)
        visible_end = np.minimum(i + 1, key_length) if is_causal else np.full_like(i, key_length)
        counts = []
        for size in self.block_sizes:
            start = i // (size or whole) * (size or whole)
            end = np.minimum(start + (size or whole), visible_end)
            counts.append(int(np.maximum(end - start, 0).sum()))
        return counts

    def plot(self, length: int | None = None, ax: Axes | None = None) -> Axes:
        """Draw the dot-product width `R_m` of every pair.

        Args:
            length: positions to draw; by default two blocks of level 2, or 64 where there is one level.
            ax: matplotlib axes; by default those of a new figure.

        Raises:
            ImportError: without matplotlib, naming the extra that brings it.
        """
        pyplot = checks.require("matplotlib.pyplot", "plot")
        length = length or (2 * (self.block_sizes[1] or 0) if self.levels > 1 else 64)
        ax = ax or pyplot.subplots(figsize=(4.5, 4))[1]
        at = torch.from_numpy(sampled_positions(length))
        width = torch.tensor(self.prefix_ranks)[self.depth(at[:, None], at[None, :]) - 1]
        image = draw_pair_widths(ax, width.numpy(), length)
        ax.figure.colorbar(image, ax=ax, label="dimensions of the dot product")
        ax.set(xlabel="key position", ylabel="query position", title=f"ranks {'|'.join(map(str, self.ranks))}")
        return ax


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse ranks such as `32|8|4`, `32,8,4` or `8x4`.

    `8x4` is four levels of 8. A hierarchy, a config and a command all read ranks here.

    Raises:
        ValueError: `text` has another form.
    """
    rank, times, count = text.partition("x")
    if times:
        return (_integer(rank, text),) * _integer(count, text)
    return tuple(_integer(part, text) for part in text.replace(",", "|").split("|"))


def parse_block_sizes(text: str) -> tuple[int | None, ...]:
    """Parse block sizes such as `*|96|48`.

    `*` is the whole sequence; commas serve as bars.

    Raises:
        ValueError: `text` has another form.
    """
    parts = text.replace(",", "|").split("|")
    return tuple(None if part == "*" else _integer(part, text) for part in parts)


def _integer(part: str, text: str) -> int:
    if not part.strip().isdecimal():
        raise ValueError(f"expected a positive integer, got {part!r} in {text!r}")
    return int(part)


def _number(part: str, text: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise ValueError(f"expected a number, got {part!r} in {text!r}") from None


def _mean_gains(levels: int) -> tuple[float, ...]:
    return tuple(1.0 / depth for depth in range(1, levels + 1))


def _sequence(name: str, value: object) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, got {value!r} ({type(value).__name__})")
    return tuple(value)


def _check_ranks(ranks: Iterable[int]) -> tuple[int, ...]:
    values = _sequence("ranks", ranks)
    if not values:
        raise ValueError("ranks must name at least one level, got none")
    return tuple(checks.positive_int(f"ranks[{level}]", rank) for level, rank in enumerate(values))


def _check_block_sizes(block_sizes: Iterable[int | None], levels: int) -> tuple[int | None, ...]:
    values = _sequence("block_sizes", block_sizes)
    if len(values) != levels:
        raise ValueError(f"block_sizes must have one entry per level ({levels}), got {len(values)}: {values}")
    if values[0] is not None:
        raise ValueError(f"block_sizes[0] must be None, the global level, got {values[0]!r}")
    for level, size in enumerate(values[1:], start=1):
        checks.positive_int(f"block_sizes[{level}]", size)
        coarser = values[level - 1]
        if coarser is not None and (size >= coarser or coarser % size):
            raise ValueError(
                f"block_sizes must shrink and nest: block_sizes[{level}] = {size} must be a proper divisor of "
                f"block_sizes[{level - 1}] = {coarser}"
            )
    return tuple(values)


def _check_gains(gains: Iterable[float] | str | None, levels: int) -> tuple[float, ...]:
    if gains is None:
        return (1.0,) * levels
    if gains == "mean":
        return _mean_gains(levels)
    if isinstance(gains, str):
        raise ValueError(f"gains must be 'mean', None or {levels} numbers, got {gains!r}")
    values = _sequence("gains", gains)
    if len(values) != levels:
        raise ValueError(f"gains must have one entry per level ({levels}), got {len(values)}: {values}")
    return tuple(checks.finite(f"gains[{level}]", gain) for level, gain in enumerate(values))
