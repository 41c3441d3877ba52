"""Check config fields by type; write and read them as text."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from structattn import checks
from structattn.ops.hierarchy_text import parse_ranks, parse_sizes

Count = Annotated[int, "at least 0"]
"""An integer that may be 0; a plain `int` of a field is positive."""

_RANKS = (tuple[int, ...], tuple[Count, ...])
_BLOCKS = tuple[int | None, ...]
_PAIRS = (tuple[tuple[int, int], ...], tuple[tuple[int, int], tuple[int, int]])


def checked(name: str, hint: Any, value: Any) -> Any:
    """Return `value` as type `hint`, with lists as tuples.

    Raises:
        TypeError, ValueError: naming `name`.
    """
    hint, optional = _without_none(hint)
    if value is None and optional:
        return None
    if get_origin(hint) is Literal:
        return checks.one_of(name, value, get_args(hint))
    if hint == Count:
        return 0 if value == 0 and not isinstance(value, bool) else checks.positive_int(name, value)
    if hint is int:
        return checks.positive_int(name, value)
    if hint is bool:
        return checks.boolean(name, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {value!r} ({type(value).__name__})")
    if not value:
        raise ValueError(f"{name} must not be empty")
    inner = get_args(hint)
    if inner[-1] is ...:
        return tuple(checked(f"{name}[{index}]", inner[0], item) for index, item in enumerate(value))
    if len(value) != len(inner):
        raise ValueError(f"{name} must hold {len(inner)} numbers, got {value!r}")
    return tuple(
        checked(f"{name}[{index}]", item_hint, item)
        for index, (item_hint, item) in enumerate(zip(inner, value, strict=True))
    )


def to_text(value: Any) -> str:
    """Return the text that `from_text` reads back.

    Examples: `true`, `128`, `32|8|4`, `8x4`, `*|96|48`, `16x32|8x8`; a name stays as it is.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and len(value) > 2 and len(set(value)) == 1 and isinstance(value[0], int):
        return f"{value[0]}x{len(value)}"
    if isinstance(value, tuple):
        return "|".join("x".join(map(str, item)) if isinstance(item, tuple) else to_text(item) for item in value)
    return "*" if value is None else str(value)


def from_text(name: str, hint: Any, text: str) -> Any:
    """Read a value from text, for `checked`.

    Bars and commas mean the same.

    Raises:
        ValueError: the text has another form; mostly naming `name`.
        TypeError: values of this type have no spelling.
    """
    hint, _ = _without_none(hint)
    text = text.replace(",", "|")
    if get_origin(hint) is Literal:
        return text
    if hint is bool:
        return {"true": True, "false": False}[checks.one_of(name, text, ["true", "false"])]
    if hint is int:
        return _integer(name, text)
    if hint in _RANKS:
        return parse_ranks(text)
    if hint == _BLOCKS:
        return parse_sizes(text)
    if hint in _PAIRS:
        return tuple(tuple(_integer(name, number) for number in pair.split("x")) for pair in text.split("|"))
    raise TypeError(f"{name} has a type without a spelling: {hint}")


def to_plain(value: Any) -> Any:
    """Return `value` with lists for tuples, as JSON does."""
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return the type without None, and True if None was allowed."""
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        (inner,) = (arg for arg in get_args(hint) if arg is not NoneType)
        return inner, True
    return hint, False


def _integer(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{name} must be a positive integer, got {text!r}")
    return int(text)
