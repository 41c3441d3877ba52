"""Check arguments.

A check raises TypeError or ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
from collections.abc import Iterable, Sequence
from types import ModuleType

from structattn import versions


def positive_int(name: str, value: object) -> int:
    """Return `value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be a positive integer, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value if isinstance(value, int) else int(value)


def positive_ints(name: str, values: object) -> tuple[int, ...]:
    """Return `values` as a nonempty tuple of ints of at least 1."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of positive integers, got {values!r} ({type(values).__name__})")
    if not values:
        raise ValueError(f"{name} must hold at least one positive integer, got none")
    return tuple(positive_int(f"{name}[{index}]", value) for index, value in enumerate(values))


def finite(name: str, value: object) -> float:
    """Return `value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not -math.inf < number < math.inf:  # Not `math.isfinite`, which a compiler cannot ask of a symbol.
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def positive(name: str, value: object) -> float:
    """Return `value` as a finite float above 0."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return number


def probability(name: str, value: object) -> float:
    """Return `value` as a float in [0, 1)."""
    number = finite(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {number}")
    return number


def boolean(name: str, value: object) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def text(name: str, value: object) -> str:
    """Return `value` if it is a nonempty string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} ({type(value).__name__})")
    if not value:
        raise ValueError(f"{name} must not be empty")
    return value


def one_of(name: str, value: str, options: Iterable[str]) -> str:
    """Return `value` if it is among `options`; the error names the nearest."""
    known = list(options)
    if value in known:
        return value
    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the nearest name, or `""`."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_DISTRIBUTIONS = {"chronos": "chronos-forecasting", "sklearn": "scikit-learn"}


def require(module: str, extra: str) -> ModuleType:
    """Import and return an optional dependency.

    Raises:
        ImportError: it is missing (the message names the extra that installs it), or older than was tested.
    """
    name = module.partition(".")[0]
    versions.check(_DISTRIBUTIONS.get(name, name))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"this needs {error.name}: pip install 'structattn[{extra}]'") from error
