"""Compare installed libraries with the versions that were tested."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import warnings
from importlib import resources
from typing import Literal

Standing = Literal["missing", "older", "tested", "newer"]

_BREAKS_BETWEEN_MINORS = ("transformers",)


@functools.cache
def tested() -> dict[str, tuple[str, str]]:
    """Return the oldest and the newest tested version of each library, by its name on the package index."""
    read: dict[str, tuple[str, str]] = json.loads(
        resources.files("structattn").joinpath("tested.json").read_text(encoding="utf-8")
    )
    return read


def installed(package: str) -> str | None:
    """Return the installed version of a package; None if missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def standing(package: str, version: str | None) -> Standing:
    """Compare a version with those that were tested; what differs in the last number alone is not newer."""
    if version is None:
        return "missing"
    oldest, newest = (_numbers(each) for each in tested()[package])
    if _numbers(version) < oldest:
        return "older"
    return "newer" if _numbers(version)[:2] > newest[:2] else "tested"


@functools.cache
def check(package: str) -> None:
    """Refuse a version older than any tested one, and warn of a newer one where minor versions break things.

    Packages that were never tested, or are missing, pass: importing them says what is wrong.

    Raises:
        ImportError: the installed version is too old.
    """
    version = installed(package)
    if package not in tested() or version is None:
        return
    oldest, newest = tested()[package]
    found = standing(package, version)
    if found == "older":
        raise ImportError(f"structattn needs {package} {oldest} or newer, got {version}: pip install -U {package}")
    if found == "newer" and package in _BREAKS_BETWEEN_MINORS:
        warnings.warn(
            f"structattn was tested with {package} up to {newest}, got {version}: results may differ", stacklevel=2
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: (2, 13, 0) for `2.13.0+cpu`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
