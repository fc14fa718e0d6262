"""Things by name that rooms above and other packages add: features, kinds of teachers.

What is built in is named by module and attribute and imported when it is first asked for, so that
a command that only reads files does not import torch. Installed packages add theirs as entry points
of the registry's group, a script by ``register``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points


class Registry[T]:
    """Names, in order: those built in, those of installed packages, those registered.

    Args:
        group: entry points of this group are names, too.
        built_in: name -> ``package.module:attribute``, which makes the thing when it is called,
            as what an entry point names does.
    """

    def __init__(self, group: str, built_in: Mapping[str, str]) -> None:
        self.group = group
        self._built_in = dict(built_in)
        self._installed: dict[str, EntryPoint] | None = None
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> None:
        """Add one.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.names():
            raise ValueError(f"{self.group}: {name!r} is there already; choose another name")
        self._items[name] = item

    @contextlib.contextmanager
    def registered(self, name: str, item: T) -> Iterator[T]:
        """Inside the block there is one more."""
        self.register(name, item)
        try:
            yield item
        finally:
            del self._items[name]

    def names(self) -> list[str]:
        """All names, nothing imported."""
        return list(dict.fromkeys([*self._built_in, *self._entry_points(), *self._items]))

    def loaded(self, name: str) -> T | None:
        """The thing of that name, ``None`` where it has not been imported."""
        return self._items.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            KeyError: there is none.
        """
        if name not in self._items:
            if name in self._built_in:
                module, _, attribute = self._built_in[name].partition(":")
                self._items[name] = getattr(import_module(module), attribute)()
            else:
                self._items[name] = self._entry_points()[name].load()()
        return self._items[name]

    def __iter__(self) -> Iterator[T]:
        """All things, imported where they have not been yet."""
        return (self[name] for name in self.names())

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._installed is None:
            self._installed = {point.name: point for point in entry_points(group=self.group)}
        return self._installed
