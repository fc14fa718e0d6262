"""Parameters that have other values while their part of the model runs, and only then.

A decoder layer is one part, and so is every other module that owns such a parameter itself. A part
gets the values in a forward pre-hook and gives them back in a forward hook, also after an
exception; the parameters' own storages are set aside and never written to. So no more than one
part's values are needed at a time (a part inside another has its own).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch


def units(
    chunks: Iterable[torch.nn.Module], wanted: Container[torch.nn.Parameter]
) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
    """The wanted parameters by the part that they belong to.

    Args:
        chunks: bare model chunks, whose decoder and MTP layers are parts (Megatron's
            ``decoder.layers`` and ``mtp.layers``).
        wanted: parameters; a parameter that several modules share belongs to the first.
    """
    by_module: dict[torch.nn.Module, list[torch.nn.Parameter]] = {}
    seen: set[torch.nn.Parameter] = set()
    for chunk in chunks:
        layers = [
            layer
            for name in ("decoder", "mtp")
            for layer in getattr(getattr(chunk, name, None), "layers", ())
        ]
        whole = [(layer, list(layer.parameters())) for layer in layers]
        inside = {module for layer in layers for module in layer.modules()}
        owners = [(m, list(m.parameters(False))) for m in chunk.modules() if m not in inside]
        for module, parameters in (*whole, *owners):
            unit = [p for p in parameters if p in wanted and p not in seen]
            seen.update(unit)
            if unit:
                by_module[module] = unit
    return by_module


@contextlib.contextmanager
def borrowing(
    parts: Mapping[torch.nn.Module, Sequence[torch.nn.Parameter]],
    value_of: Callable[[torch.nn.Parameter], torch.Tensor],
) -> Iterator[None]:
    """Inside the block, each part's parameters have the value that is asked for as it begins.

    Args:
        parts: as ``units`` gives them. Parts run one at a time, each through its ``__call__``.
        value_of: of a parameter, on the part's device.
    """
    saved: dict[torch.nn.Parameter, torch.Tensor] = {}

    def begin(module: torch.nn.Module, *_: Any) -> None:
        for parameter in parts[module]:
            if parameter not in saved:  # a part that has begun, and was left before its end
                saved[parameter] = parameter.data
                parameter.data = value_of(parameter)

    def end(module: torch.nn.Module, *_: Any) -> None:
        for parameter in parts[module]:
            if parameter in saved:
                parameter.data = saved.pop(parameter)

    with contextlib.ExitStack() as hooks:
        for module in parts:
            hooks.callback(module.register_forward_pre_hook(begin).remove)
            hooks.callback(module.register_forward_hook(end, always_call=True).remove)
        try:
            yield
        finally:
            for parameter, data in saved.items():
                parameter.data = data
