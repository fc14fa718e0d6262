"""Public names of a room that are imported when they are first asked for.

What they need, such as torch, is then no price of what only reads files or recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package's ``__init__``; type checkers see ordinary imports instead.

    Args:
        package: its dotted name.
        homes: by module of the package, the names that it gives.
    """

    def named(name: str) -> Any:
        for module, names in homes.items():
            if name in names:
                return getattr(import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return named
