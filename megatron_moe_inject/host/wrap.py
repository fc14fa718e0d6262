"""The one way in which functions and methods of Megatron's are wrapped.

A wrapper takes the place of a method on one object, or of a function in its module; classes stay
as they are, but on the CPU lane. It carries a mark, keeps what it wraps in ``__wrapped__``, and
hands each call on as a ``Call``, whose arguments are read by Megatron's names: it does not matter
how Megatron passes them, nor what else it passes. What a wrapper reads is a row of the contract
(``host.contract.Wrapped``) and is checked on the very object that is wrapped.

The marks are the only record of what is wrapped; ``wrap_list`` finds them where they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from megatron_moe_inject.host.contract import Wrapped, resolve
from megatron_moe_inject.host.errors import RecipeError

_PACKAGE = __name__.partition(".")[0]
_MARK = f"_{_PACKAGE}"
_Places = Mapping[str, tuple[int | None, Any]]
"""By name of a parameter: its position, None if it has none, and its default."""


class Call:
    """One call of something wrapped.

    Calling it runs what is wrapped, with the arguments of this call but for those that are given.

    Attributes:
        stock: what is wrapped.
        args: passed by position.
        kwargs: passed by name.
    """

    __slots__ = ("_places", "args", "kwargs", "stock")

    def __init__(
        self, stock: Callable, places: _Places, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self.stock = stock
        self.args = args
        self.kwargs = kwargs
        self._places = places

    def __getitem__(self, name: str) -> Any:
        """An argument by the name of a parameter that the row has; its default if not passed."""
        position, default = self._places[name]
        if name in self.kwargs:
            return self.kwargs[name]
        if position is not None and position < len(self.args):
            return self.args[position]
        if default is inspect.Parameter.empty:
            raise TypeError(f"{getattr(self.stock, '__qualname__', self.stock)}: {name} is missing")
        return default

    def __call__(self, **changed: Any) -> Any:
        """Run what is wrapped, with some arguments changed."""
        return self.of(self.stock, **changed)

    def of(self, function: Callable, **changed: Any) -> Any:
        """Run another function of the same parameters with the arguments of this call, some of
        them changed."""
        if not changed:
            return function(*self.args, **self.kwargs)
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changed.items():
            position = self._places[name][0]
            if name in kwargs or position is None or position >= len(args):
                kwargs[name] = value
            else:
                args[position] = value
        return function(*args, **kwargs)


class Wrap:
    """One wrapper in its place, see ``wrap_method``.

    Attributes:
        owner: the object, class or module whose attribute it is.
        method: its row of the contract.
        around: what is handed each ``Call``.
    """

    def __init__(self, owner: Any, method: Wrapped, around: Callable[[Call], Any]) -> None:
        self.owner = owner
        self.method = method
        self.around = around
        stock = getattr(owner, method.name)
        inner = wrap_of(stock)
        # Whether what lies under all wrappers is the owner's own and not its class's.
        self._own: bool = method.name in vars(owner) if inner is None else inner._own
        self._off = False
        places = _places(stock)
        lacking = [name for name in method.parameters if name not in places]
        if lacking:
            raise RecipeError(
                f"{kind_of(owner)}.{method.name}({', '.join(places)}) has no parameter "
                f"{' and no '.join(lacking)}, which {origin(around)} reads; this is a Megatron "
                "that is not supported, or another tool's patch of it"
            )
        read = {name: places[name] for name in method.parameters}

        @functools.wraps(stock)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(Call(wrapper.__wrapped__, read, args, kwargs))

        setattr(wrapper, _MARK, self)
        self._wrapper = wrapper
        setattr(owner, method.name, wrapper)

    @property
    def stock(self) -> Callable:
        """What is wrapped: Megatron's own, or a wrapper that was there before."""
        return self._wrapper.__wrapped__

    def remove(self) -> None:
        """Take the wrapper off, also from under others of ours; nothing if it is off.

        Raises:
            RuntimeError: something else has wrapped it or has taken its place.
        """
        if self._off:
            return
        chain = list(_chain(getattr(self.owner, self.method.name)))
        at = next((i for i, value in enumerate(chain) if value is self._wrapper), None)
        if at is None or (at > 0 and wrap_of(chain[at - 1]) is None):
            raise RuntimeError(
                f"{kind_of(self.owner)}.{self.method.name}: wrapped or replaced by something else"
            )
        if at > 0:
            chain[at - 1].__wrapped__ = self.stock
        elif self._own or wrap_of(self.stock) is not None:
            setattr(self.owner, self.method.name, self.stock)
        else:
            delattr(self.owner, self.method.name)
        self._off = True


def wrap_method(owner: Any, method: Wrapped, around: Callable[[Call], Any]) -> Wrap:
    """Let ``around`` stand around a method of one object, or a function of a module.

    A second wrap goes around the first; with an ``around`` that is already there nothing changes.

    Args:
        owner: the object, class or module.
        method: the row of the contract; the last part of its path is the attribute that is wrapped,
            and its parameters are those that ``around`` reads.
        around: gets each ``Call`` and gives the result.

    Returns:
        The wrapper, which can be removed.

    Raises:
        AttributeError: the owner has no such attribute.
        RecipeError: it lacks a parameter that ``around`` reads.
    """
    there = (wrap for wrap in wraps_of(owner, method.name) if wrap.around == around)
    return next(there, None) or Wrap(owner, method, around)


def wrap_function(function: Wrapped, around: Callable[[Call], Any]) -> Wrap:
    """``wrap_method`` of a function or method that stands where its row says: in its module, or in
    its class."""
    return wrap_method(resolve(function.path.rpartition(".")[0]), function, around)


def wrap_of(value: Any) -> Wrap | None:
    """The wrap whose wrapper a function is, if it is one. (What ``functools.wraps`` makes of a
    wrapper carries its mark too, and is none.)"""
    wrap = getattr(value, _MARK, None)
    return wrap if isinstance(wrap, Wrap) and wrap._wrapper is value else None


def wraps_of(owner: Any, name: str) -> Iterator[Wrap]:
    """The wraps around an attribute, from the outermost in."""
    yield from filter(None, map(wrap_of, _chain(getattr(owner, name))))


def kind_of(owner: Any) -> str:
    """The name of a module, of a class, or of an object's class."""
    if isinstance(owner, ModuleType):
        return owner.__name__
    return owner.__qualname__ if isinstance(owner, type) else type(owner).__qualname__


def origin(function: Any) -> str:
    """The module of this package that a function, bound method or ``partial`` comes from."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.removeprefix(f"{_PACKAGE}.")


def _chain(value: Any) -> Iterator[Any]:
    while value is not None:
        yield value
        value = getattr(value, "__wrapped__", None)


def _places(function: Callable) -> dict[str, tuple[int | None, Any]]:
    """The parameters that can be named; none where a function does not tell them."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return {}
    return {
        p.name: (None if p.kind is p.KEYWORD_ONLY else position, p.default)
        for position, p in enumerate(parameters)
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
