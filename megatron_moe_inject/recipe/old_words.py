"""Keys of a recipe that have another name now; the old ones go on working for one release."""

from __future__ import annotations

from typing import Any

RENAMED = {"objective.features": "imitation", "objective.retention": "retention"}
"""Old -> new; a new one stands at the top."""


def current(key: str) -> str:
    """A dotted key by today's words."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def rename(plain: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """A recipe by today's words, and a remark for each old one; ``plain`` stays as it is.

    A section that stands under both names is left, so that the old one ends as an unknown key.
    """
    remarks = []
    for old, new in RENAMED.items():
        parent, _, name = old.rpartition(".")
        around = plain.get(parent)
        if isinstance(around, dict) and name in around and new not in plain:
            rest = {key: value for key, value in around.items() if key != name}
            plain = {**plain, parent: rest, new: around[name]}
            remarks.append(f"{old} is called {new} now; the old name will go with version 2")
    return plain, remarks
