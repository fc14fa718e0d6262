"""What each call of torch and each operation does with the places of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.pretended_gpu import rules
from tests.harness.pretended_gpu.copies import count_copy, is_pinned, moved_to
from tests.harness.pretended_gpu.places import (
    CPU,
    EITHER,
    GPU,
    fault,
    host_reads,
    place,
    place_of,
    put,
    state,
    storage_of,
    tensors_in,
    waits,
    without_function_modes,
)

# Calls of torch's functions: what their arguments say of the place


@functools.cache
def _name(func: Any) -> str:
    return func._schema.name


@functools.cache
def _writes_first(func: Any) -> bool:
    """Whether an operation changes its first tensor."""
    arguments = func._schema.arguments
    return bool(arguments and arguments[0].alias_info and arguments[0].alias_info.is_write)


def of_torch(function: Any) -> Any:
    """torch's own where the lane has put a stand-in."""
    return getattr(function, "__wrapped__", function)


_FROM_DATA = tuple(
    map(of_torch, (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor))
)
_SET = torch.Tensor.__setitem__


class Calls(TorchFunctionMode):
    """Knows what ``device=`` a call names, and where its tensors are, while it goes on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:
            with without_function_modes():
                return func(*args, **kwargs)
        if func in _FROM_DATA:
            return _from_data(func, args, kwargs)
        device, flight = kwargs.get("device"), ""
        pins = bool(kwargs.pop("pin_memory", False))
        if device is not None:
            if isinstance(device, str | torch.device) and str(device).startswith("meta"):
                return func(*args, **kwargs)
            flight = place_of(device)
            if flight == GPU:
                kwargs["device"] = torch.device("cpu")
        elif any(place(tensor) == GPU for tensor in tensors_in((args, kwargs))):
            flight = "set" if func is _SET else "of tensors"
            if func is torch.nn.functional.one_hot and len(args) + len(kwargs) > 1:
                flight = "checks"
        state.flights.append(flight)
        try:
            out = func(*args, **kwargs)
        finally:
            state.flights.pop()
        if pins:
            storage_of(out).pinned = True
        return out


def _from_data(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.tensor`` and its like: a copy of the host's numbers, for which it waits."""
    method = func is torch.Tensor.new_tensor
    data = args[1 if method else 0] if len(args) > method else kwargs["data"]
    pins = bool(kwargs.pop("pin_memory", False))
    device = kwargs.pop("device", None)
    held = isinstance(data, torch.Tensor)
    at = place(data) if held else CPU
    where = place_of(device) if device is not None else at if held or not method else GPU
    if device is not None and str(device).startswith("meta"):
        return func(*args, device=device, **kwargs)
    if held and at != where:
        return moved_to(data, "cuda" if where == GPU else "cpu", kwargs.get("dtype"))
    with without_function_modes():
        out = func(*args, **kwargs)
    if not held and where == GPU:
        out = put(out.clone(), GPU)
        waits("a tensor of the host's numbers")
    elif held and where == GPU:
        put(out, GPU)
    if pins:
        storage_of(out).pinned = True
    return out


# Operations


class Operations(TorchDispatchMode):
    """Sees every operation, also of autograd's backward passes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # it runs operations of its own, which are seen
        with without_function_modes():
            return _operate(func, args, kwargs or {})


def _operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    inputs = tensors_in((args, kwargs))
    if any(tensor.is_meta for tensor in inputs):
        return func(*args, **kwargs)
    if name.startswith("c10d::"):
        _collective(name, args, inputs)
        return func(*args, **kwargs)
    if name in rules.COPIES:
        where = _copied(name, args, kwargs, inputs)
    elif name in rules.INDEXING:
        where = _indexed(name, args)
    else:
        where = _together(func, inputs)
        if name in rules.MAKERS or not inputs:
            where = _made(kwargs, where)
    for tensor in inputs:
        if where == CPU and name not in rules.SHAPES:
            host_reads(tensor, name)
    if where == GPU and "checks" not in state.flights[-1:]:
        why = rules.waits(name, func, args, kwargs)
        if why and not (name == "aten::masked_fill" and place(args[2]) == CPU):
            waits(why)
    out = func(*args, **kwargs)
    if where != CPU:
        for tensor in tensors_in((out,)):
            storage = storage_of(tensor)
            if not hasattr(storage, "place"):
                storage.place = where
    if name in rules.UNSET:
        _poison(out)
    return out


def _together(func: Any, inputs: list[torch.Tensor]) -> str:
    """The one place of an operation's tensors."""
    places = [place(tensor) for tensor in inputs]
    if GPU not in places:
        return EITHER if places and all(at == EITHER for at in places) else CPU
    for number, (tensor, at) in enumerate(zip(inputs, places, strict=True)):
        if at == EITHER:
            put(tensor, GPU)
        elif at == CPU and (tensor.dim() > 0 or (number == 0 and _writes_first(func))):
            if _name(func) in rules.ANY_PLACE:
                continue
            fault(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({_name(func)}: "
                f"{[(list(x.shape), place(x)) for x in inputs]})"
            )
    return GPU


def _made(kwargs: dict[str, Any], of: str) -> str:
    """Where a new tensor lies: by the call's ``device=``, else as what it is made like."""
    flight = state.flights[-1] if state.flights else EITHER
    if flight in (CPU, GPU):
        return flight
    if of == GPU or kwargs.get("device") is None or flight in ("", "set"):
        return of
    # Made in C++ by the options of a tensor.
    return EITHER if flight == EITHER else GPU


def _copied(name: str, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> str:
    if name == "aten::_to_copy":
        return state.moving or place(args[0])
    for target, source in _pairs(name, args):
        to, at = place(target), place(source)
        if to == EITHER and at != EITHER:
            put(target, at)
            to = at
        if at == CPU:
            host_reads(source, "copy_")
        late = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        small = at == CPU and source.dim() == 0 and "fill" in name
        if not small:
            pinned = is_pinned(source) if at == CPU else is_pinned(target)
            count_copy(at, to, late, pinned, source.nbytes, name.partition("::")[2])
        if late and at == GPU and to == CPU:
            storage_of(target).lands = state.landed
    return CPU


def _pairs(name: str, args: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(*args[:2], strict=True) if "foreach" in name else [(args[0], args[1])]


def _indexed(name: str, args: Any) -> str:
    """An index may come from the host, which waits while it is copied."""
    at = place(args[0])
    values = tensors_in(args[2:3])
    indices = tensors_in(args[1])
    for index in indices:
        if at == GPU and place(index) == CPU:
            waits("an index on the CPU")
        elif at == CPU and place(index) == GPU:
            fault("indices should be either on cpu or on the same device as the indexed tensor")
    filled = "put" in name and all(place(x) == CPU and x.numel() == 1 for x in values)
    if at == GPU and not filled and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
        waits("a mask as an index")
    for value in values:
        if place(value) not in (at, EITHER) and not (place(value) == CPU and value.dim() == 0):
            fault(f"{name}: the values lie on another device than what is indexed")
    return at


_POISON = -7_777_777


def _poison(out: Any) -> None:
    """What nobody has set must not be read."""
    for tensor in tensors_in((out,)):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(_POISON)


def _collective(name: str, args: Any, inputs: list[torch.Tensor]) -> None:
    group = next((_unboxed(value) for value in args if isinstance(value, torch.ScriptObject)), None)
    host = group is not None and group.group_name in state.on_host
    if name == "c10d::barrier":
        if not host:
            waits("a barrier of a device group")
        return
    for tensor in inputs:
        at = place(tensor)
        if tensor.numel() and at != EITHER and (at == CPU) != host:
            fault(f"{name} of a {'host' if host else 'device'} group got a tensor on the {at}")
        if at == CPU:
            host_reads(tensor, name)


def _unboxed(value: Any) -> Any:
    try:
        return dist.ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):
        return None
