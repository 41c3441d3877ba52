"""Read and write the text form of hierarchies and their parts."""

from __future__ import annotations

from collections.abc import Iterable

Sizes = tuple[int | None, ...]


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse ranks such as `32|8|4`, `32,8,4` or `8x4`.

    `8x4` is four levels of 8. A hierarchy, a config and a command all read ranks here.

    Raises:
        ValueError: `text` has another form.
    """
    rank, times, count = text.partition("x")
    if times:
        return (integer(rank, text),) * integer(count, text)
    return tuple(integer(part, text) for part in text.replace(",", "|").split("|"))


def parse_sizes(text: str) -> Sizes:
    """Parse block sizes or windows such as `*|96|48`.

    `*` is the whole sequence; commas serve as bars.

    Raises:
        ValueError: `text` has another form.
    """
    parts = text.replace(",", "|").split("|")
    return tuple(None if part == "*" else integer(part, text) for part in parts)


def parse_windows(text: str, levels: int) -> Sizes:
    """Parse windows such as `*|512|128`. With `512|128` for three levels, level 1 sees everything."""
    windows = parse_sizes(text)
    return (None, *windows) if len(windows) == levels - 1 else windows


def join(numbers: Iterable[int | None]) -> str:
    """Return numbers with bars between them; None is `*`."""
    return "|".join("*" if number is None else str(number) for number in numbers)


def integer(part: str, text: str) -> int:
    """Return the integer that `part` of `text` spells; ValueError otherwise."""
    if not part.strip().isdecimal():
        raise ValueError(f"expected a positive integer, got {part!r} in {text!r}")
    return int(part)


def number(part: str, text: str) -> float:
    """Return the number that `part` of `text` spells; ValueError otherwise."""
    try:
        return float(part)
    except ValueError:
        raise ValueError(f"expected a number, got {part!r} in {text!r}") from None
