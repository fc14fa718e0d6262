"""What a user's mistake is reported as: one line that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_WORD = re.compile(r"[\w-]{1,80}")

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What domains and teachers may be called."""


class RecipeError(ValueError):
    """A mistake in what the user wrote: one message with the key, the value and the remedy.

    ``key`` is the dotted path the message starts with, where there is one
    (``domains[0].experts.layers.3``), so that a caller can translate it to a flag.
    """

    def __init__(self, message: str, key: str | None = None):
        super().__init__(message)
        self.key = key


Failure = Callable[[str, str], RecipeError]
"""Makes the error for a problem and a remedy, with the key or flag that they belong to."""


def fail(key: str, value: Any, problem: str, remedy: str) -> RecipeError:
    """The error "key: value problem; remedy" on one line; the value is shortened when long."""
    return RecipeError(f"{key}: {show(value)} {problem}; {remedy}", key)


def show(value: Any) -> str:
    """``repr`` of a user's value on one line, at most 80 characters."""
    try:
        return one_line(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nest
        return f"this {type(value).__name__}"


def show_path(path: Any) -> str:
    """A path on one line, quoted, and whole unless it is very long."""
    return one_line(repr(str(path)), 300)


def one_line(text: str, limit: int = 80) -> str:
    """Text with its white space collapsed, cut to ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(names: Iterable[Any], limit: int = 12) -> str:
    """Names joined by commas, the tail beyond ``limit`` counted instead of shown."""
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def suggest(word: Any, known: Iterable[Any], what: str) -> str:
    """A remedy for a misspelt name: the closest known one, then all of them."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}{what}: {listing(known) or '(none)'}"


def child(path: str, key: Any) -> str:
    """Dotted path of a mapping's entry; a key that is no word is shown quoted."""
    text = key if isinstance(key, str) and _WORD.fullmatch(key) else show(key)
    return f"{path}.{text}" if path else text
