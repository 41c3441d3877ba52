"""Compare installed libraries with the needed and the tested versions."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import warnings
from importlib import resources
from typing import Literal

Standing = Literal["missing", "too old", "older", "tested", "newer"]

_BREAKS_BETWEEN_MINORS = ("transformers",)


@functools.cache
def tested() -> dict[str, tuple[str, str]]:
    """Return the oldest and newest tested version of each library.

    Keys are names on the package index. Tested are versions that the whole suite ran with.
    """
    return {name: (row["oldest"], row["newest"]) for name, row in _record().items()}


@functools.cache
def needed() -> dict[str, str]:
    """Return the oldest supported version of each library, tested or not."""
    return {name: row["needed"] for name, row in _record().items()}


def installed(package: str) -> str | None:
    """Return the installed version of a package; None if missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def standing(package: str, version: str | None) -> Standing:
    """Compare a version with needed and tested ones; patches count as tested."""
    if version is None:
        return "missing"
    oldest, newest = (_numbers(each) for each in tested()[package])
    if _numbers(version) < _numbers(needed()[package]):
        return "too old"
    if _numbers(version) < oldest:
        return "older"
    return "newer" if _numbers(version)[:2] > newest[:2] else "tested"


@functools.cache
def check(package: str) -> None:
    """Refuse a version that is too old; warn of risky newer ones.

    Packages without a record and missing ones pass: importing them says what is wrong.

    Raises:
        ImportError: the installed version is too old.
    """
    version = installed(package)
    if package not in tested() or version is None:
        return
    found = standing(package, version)
    if found == "too old":
        raise ImportError(
            f"structattn needs {package} {needed()[package]} or newer, got {version}: pip install -U {package}"
        )
    if found == "newer" and package in _BREAKS_BETWEEN_MINORS:
        newest = tested()[package][1]
        warnings.warn(
            f"structattn was tested with {package} up to {newest}, got {version}: results may differ", stacklevel=2
        )


@functools.cache
def _record() -> dict[str, dict[str, str]]:
    text = resources.files("structattn").joinpath("tested.json").read_text(encoding="utf-8")
    record: dict[str, dict[str, str]] = json.loads(text)
    return record


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: (2, 13, 0) for `2.13.0+cpu`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
