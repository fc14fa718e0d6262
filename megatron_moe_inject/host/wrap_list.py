"""What is wrapped in a run, found on the very objects; what parts would wrap, from their rows."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_moe_inject.host.contract import Contract, Hooked, Wrapped, resolve
from megatron_moe_inject.host.text import table
from megatron_moe_inject.host.wrap import kind_of, origin, wrap_of, wraps_of

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict post-hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}
"""Kinds of hooks, by the attribute of a module in which torch keeps them."""

_INNER = ("token_dispatcher", "chained_optimizers", "optimizer")
"""Where Megatron's objects keep others that may be wrapped and are no modules."""


class InPlace(NamedTuple):
    """Something that is wrapped.

    Attributes:
        where: class and method, or class and kind of hook.
        by: the module of this package that wrapped it.
    """

    where: str
    by: str


def wrapped_in(roots: Iterable[Any]) -> Iterator[InPlace]:
    """What is wrapped and hooked in models and optimizers.

    Args:
        roots: bare model chunks, and Megatron's optimizer.
    """
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        owner = waiting.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, torch.nn.Module):
            waiting.extend(owner.children())
            yield from _hooks(owner)
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if name in _INNER:
                waiting.extend(value if isinstance(value, list) else [value])
            elif wrap_of(value) is not None:
                for wrap in wraps_of(owner, name):
                    yield InPlace(f"{kind_of(owner)}.{name}", origin(wrap.around))


def wrapped_functions(contracts: Iterable[Contract]) -> Iterator[InPlace]:
    """Functions of Megatron's modules, and methods of its classes, that are wrapped now.

    Args:
        contracts: in whose rows to look for them.
    """
    paths = {use.path for part in contracts for use in part.uses if isinstance(use, Wrapped)}
    for path in sorted(paths):
        parent, _, name = path.rpartition(".")
        try:
            owner = resolve(parent)
        except (ImportError, AttributeError):  # of a package that is not there
            continue
        if name in getattr(owner, "__dict__", {}):  # None where Transformer Engine is not there
            for wrap in wraps_of(owner, name):
                yield InPlace(f"{kind_of(owner)}.{name}", origin(wrap.around))


def _hooks(module: torch.nn.Module) -> Iterator[InPlace]:
    """This package's hooks on a module."""
    package = __name__.partition(".")[0]
    for attribute, kind in HOOKS.items():
        for hook in (getattr(module, attribute, None) or {}).values():
            function = getattr(hook, "hook", hook)  # torch wraps those that get the module
            while isinstance(function, functools.partial):
                function = function.func
            if (getattr(function, "__module__", None) or "").partition(".")[0] == package:
                yield InPlace(f"{kind_of(module)} {kind}", origin(function))


def render_in_place(roots: Iterable[Any], contracts: Iterable[Contract]) -> str:
    """What is wrapped on all ranks of a job, as a table with counts.

    Args:
        roots: this rank's bare model chunks and optimizer.
        contracts: see ``wrapped_functions``; functions are counted once, not on each rank.

    Collectives: one all-gather of the counts over the whole world.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, Counter(wrapped_in(roots)))
    return _render(sum(ranks, Counter()), Counter(wrapped_functions(contracts)))


def _render(objects: Mapping[InPlace, int], functions: Mapping[InPlace, int]) -> str:
    title = (
        f"wrapped: {sum(functions.values())} functions of modules, {sum(objects.values())} methods "
        "and hooks of objects on all ranks"
    )
    rows = [("function, method or hook", "times", "wrapped by")]
    for counted in (functions, objects):
        rows += [(at.where, str(times), at.by) for at, times in sorted(counted.items())]
    return "\n".join([title, *(f"  {line}" for line in table(rows, right=(1,)))])


def render_table(contracts: Iterable[Contract]) -> str:
    """What parts would wrap, from their rows alone."""
    rows = [
        (contract.part, _short(use), use.does) for contract in contracts for use in contract.wraps
    ]
    if not rows:
        return "wraps: nothing"
    lines = table([("part", "method or hook", "what for"), *rows])
    return "\n".join(["wraps:", *(f"  {line}" for line in lines)])


def _short(use: Wrapped | Hooked) -> str:
    """``Class.method``, ``Class hook``, or a function's full name."""
    parts = use.path.split(".")
    first = next((i for i, part in enumerate(parts) if part[0].isupper()), 0)
    name = ".".join(parts[first:])
    return f"{name} {use.kind}" if isinstance(use, Hooked) else name
