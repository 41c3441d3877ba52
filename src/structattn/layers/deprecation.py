"""Old public names that keep working for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping


def serve_old_names(module: str, new_names: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module's `__getattr__` that finds old names and warns.

    Args:
        module: name of the module.
        new_names: the new name of each old one, both in the module.
    """

    def find(name: str) -> object:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is now {module}.{new_names[name]}; the old name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new_names[name])

    return find
