"""What the plugin uses of Megatron, as data, and the check that this Megatron has it.

Each room says in its ``uses.py`` which functions, classes, methods, parameters and attributes of
Megatron its parts rely on, and which methods they wrap. These files import nothing of Megatron, so
they can be read where a symbol is missing. What every run uses is checked when the plugin is
installed, the rest at start for the parts that a recipe has in use: one error names everything.

A parameter counts as used where it is passed or read by name. An attribute of an object is looked
for in its class: as a method, a field, or a name that some method of it sets.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from megatron_moe_inject.host.errors import listing

_STORE_ATTR, _LOAD_CONST, _EXTENDED_ARG = (
    dis.opmap[name] for name in ("STORE_ATTR", "LOAD_CONST", "EXTENDED_ARG")
)
_REGISTER = frozenset({"register_buffer", "register_parameter", "setattr"})


@dataclass(frozen=True)
class Use:
    """A symbol of Megatron that some part uses.

    Attributes:
        path: full dotted name of a function, class, method or constant.
        parameters: of it, that are passed or read by name.
        attributes: of a class, that its objects have or give to others.
        optional: where not every supported Megatron has it: which do. It is used only there.
        package: checked only where this package can be imported; Megatron defines it only then.
    """

    path: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    optional: str = ""
    package: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Wrapped(Use):
    """A function or method that is wrapped (``host.wrap.wrap_method``).

    Attributes:
        does: what the wrapper adds.
    """

    does: str = ""


@dataclass(frozen=True)
class Hooked(Use):
    """A class to whose objects a hook of torch's is added.

    Attributes:
        kind: one of ``host.wrap_list.HOOKS``.
        does: what the hook does.
    """

    kind: str = ""
    does: str = ""


@dataclass(frozen=True)
class Contract:
    """What one part of the plugin uses of Megatron.

    Attributes:
        part: the part, in the recipe's words where it is in the recipe.
        uses: its rows.
    """

    part: str
    uses: tuple[Use, ...]

    @property
    def wraps(self) -> tuple[Wrapped | Hooked, ...]:
        """The rows of what is wrapped or hooked."""
        return tuple(use for use in self.uses if isinstance(use, Wrapped | Hooked))


def symbols(parent: str, *names: str) -> tuple[Use, ...]:
    """Rows of several names in one module or class, of which nothing more is used."""
    return tuple(Use(f"{parent}.{name}") for name in names)


def resolve(path: str) -> Any:
    """The object of a full dotted name; ``ImportError`` or ``AttributeError`` if there is none."""
    parts = path.split(".")
    value: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if isinstance(value, ModuleType) and not hasattr(value, part):
            value = importlib.import_module(".".join(parts[: i + 1]))
        else:
            value = getattr(value, part)
    return value


def lacking(use: Use) -> Iterator[str]:
    """What this Megatron lacks of a use, each by its full name; an optional one lacks nothing
    where it is absent as a whole."""
    if use.package and not _importable(use.package):
        return
    try:
        value = resolve(use.path)
    except (ImportError, AttributeError) as error:
        absent = isinstance(error, AttributeError) or (error.name or "").startswith("megatron")
        if not (use.optional and absent):
            yield use.path if absent else f"{use.path} ({error})"
        return
    if use.parameters:
        present = inspect.signature(value).parameters
        hands_on = any(p.kind is p.VAR_KEYWORD for p in present.values())  # as others' wrappers do
        for name in use.parameters:
            if name not in present and not (use.optional or hands_on):
                yield f"{use.path}({name})"
    for name in use.attributes:
        if not has_attribute(value, name) and not use.optional:
            yield f"{use.path}.{name}"


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules holds None: taken for not installed
        return False


def missing(contracts: Iterable[Contract]) -> list[str]:
    """What this Megatron lacks of what these parts use, each with the parts that use it."""
    parts: dict[str, list[str]] = {}
    for contract in contracts:
        for use in contract.uses:
            for name in lacking(use):
                users = parts.setdefault(name, [])
                if contract.part not in users:
                    users.append(contract.part)
    return [f"{name} (for {', '.join(users)})" for name, users in sorted(parts.items())]


def unmet(contracts: Iterable[Contract], version: str, supported: Iterable[str]) -> str | None:
    """One sentence that names everything that this Megatron lacks, ``None`` if it lacks nothing.

    Args:
        contracts: of the parts in use.
        version: of this Megatron-Core.
        supported: versions that have it all.
    """
    lacks = missing(contracts)
    if not lacks:
        return None
    return (
        f"megatron_moe_inject needs {listing(lacks, len(lacks))}, which Megatron-Core {version} "
        f"does not have; supported: {', '.join(supported)}"
    )


def has_attribute(kind: type, name: str) -> bool:
    """Whether objects of a class have an attribute, as far as its source says."""
    return hasattr(kind, name) or name in _set_by(kind)


@functools.cache
def _set_by(kind: type) -> frozenset[str]:
    """Names of fields and annotations of a class and its bases, and of what their methods set on
    their own object or others, or register."""
    names: set[str] = set()
    for base in kind.__mro__:
        names.update(inspect.get_annotations(base))
        for value in base.__dict__.values():
            function = value.fget if isinstance(value, property) else value
            function = getattr(function, "__func__", function)  # of static and class methods
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType):
                names.update(_set_in(function))
    return frozenset(names)


def _set_in(function: FunctionType) -> Iterator[str]:
    """By its bytecode as it is, since ``dis`` takes ten times as long at each start of a rank."""
    code = function.__code__
    registers = not _REGISTER.isdisjoint(code.co_names)
    extended = 0
    for operation, argument in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        index = extended | argument
        extended = index << 8 if operation == _EXTENDED_ARG else 0
        if operation == _STORE_ATTR:
            yield code.co_names[index]
        elif registers and operation == _LOAD_CONST and isinstance(code.co_consts[index], str):
            yield code.co_consts[index]
