"""The part of a recipe that belongs to one feature: where it stands, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section[T]:
    """A section of the recipe, read by ``recipe[section]``.

    Attributes:
        key: its name at the top of the recipe, such as ``steering``.
        kind: an annotation that ``host.typed.build`` knows; mostly a dataclass, whose docstring's
            ``Attributes`` describe the fields. A field of ``float | Schedule`` is a weight and
            one with ``choices`` in its metadata a word, and both are checked (``recipe.fields``).
        default: what it is where the recipe does not write it.
        about: what it is, for the JSON Schema.
    """

    key: str
    kind: Any
    default: Callable[[], T]
    about: str
