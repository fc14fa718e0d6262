"""What stands beside a model whose own parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager


class Beside:
    """Parameters that change a model from beside it, such as adapters.

    Args:
        off: gives a block inside which the model is what it would be without them.
    """

    def __init__(self, off: Callable[[], AbstractContextManager[None]]) -> None:
        self.off = off


class Door(Beside):
    """The door of a model's new experts; without it they are as open as when the run began."""
