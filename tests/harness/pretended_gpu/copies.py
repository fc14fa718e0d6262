"""Copies between the places, and what a tensor says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_moe_inject.host.to_device import STAGED_BYTES
from tests.harness.pretended_gpu.places import (
    CPU,
    EITHER,
    GPU,
    STOCK,
    asking_line,
    device_of,
    host_reads,
    place,
    place_of,
    put,
    state,
    storage_of,
    waits,
    without_function_modes,
)

_BY_SIZE = "megatron_moe_inject/host/to_device.py"
"""Pins what is large. Tests are small, so that elsewhere every size counts."""
_torch: Any = torch


def count_copy(
    source: str, target: str, non_blocking: bool, pinned: bool, size: int, what: str
) -> None:
    """Count the wait of a copy from the GPU or to it, if it is one."""
    if source == target or EITHER in (source, target):
        return
    if not non_blocking:
        waits(f"{what}: a copy {'from' if source == GPU else 'to'} the GPU")
    elif not pinned and not (asking_line().startswith(_BY_SIZE) and size <= STAGED_BYTES):
        waits(f"{what}: an asynchronous copy of memory that is not pinned")


class _Move(torch.autograd.Function):
    """A copy to the other place, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: str, non_blocking: bool, kw: Any) -> torch.Tensor:
        ctx.back, ctx.dtype, ctx.non_blocking = place(x), x.dtype, non_blocking
        return _moved(x, where, non_blocking, kw)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        back = _moved(gradient, ctx.back, ctx.non_blocking, {"dtype": ctx.dtype})
        return back, None, None, None


def _moved(x: torch.Tensor, where: str, non_blocking: bool, kw: Any) -> torch.Tensor:
    if place(x) == CPU:
        host_reads(x, "a copy")
    before, state.moving = state.moving, where
    try:
        out = STOCK["to"](x, non_blocking=non_blocking, copy=True, **kw)
    finally:
        state.moving = before
    at = place(x)
    # torch itself pins what an asynchronous copy to the CPU makes. What it also converts, or
    # arranges, it copies from memory that is not pinned.
    as_it_is = out.dtype == x.dtype and out.stride() == x.stride()
    count_copy(at, where, non_blocking, at == GPU or (is_pinned(x) and as_it_is), x.nbytes, "to")
    if where == CPU and non_blocking:
        storage = storage_of(out)
        storage.pinned, storage.lands = True, state.landed
    return out


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(storage_of(tensor), "pinned", False)


def moved_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = dict(kwargs)
    if args and isinstance(args[0], torch.Tensor):
        other = args[0]
        args, kwargs = (device_of(other), other.dtype, *args[1:]), kwargs
    if "other" in kwargs:
        other = kwargs.pop("other")
        args = (device_of(other), other.dtype)
    copy = kwargs.pop("copy", False) or (len(args) == 4 and args[3])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args[:3], **kwargs)
    kw: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if layout is not None:
        kw["memory_format"] = layout
    at = place(self)
    if (device is not None and device.type == "meta") or self.is_meta:
        return STOCK["to"](self, device or "meta", copy=copy, **kw)
    where = at if device is None else place_of(device)
    if at == EITHER:
        put(self, where)
        at = where
    if where == at:
        return STOCK["to"](self, copy=copy, non_blocking=non_blocking, **kw)
    if self.requires_grad and torch.is_grad_enabled():
        return _Move.apply(self, where, non_blocking, kw)
    return _moved(self, where, non_blocking, kw)


def _pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    if place(self) == GPU:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
    if is_pinned(self):
        return self
    out = self.detach().clone()
    storage_of(out).pinned = True
    return out


_stock_clone = torch.UntypedStorage.clone


def _to_host(what: str) -> Callable[..., Any]:
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if place(self) == GPU:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                f"tensor to host memory first. [{asking_line()}]"
            )
        if not asking_line().startswith("megatron/"):  # which looks at the array once it has waited
            host_reads(self, what)
        with without_function_modes():
            return STOCK[what](self, *args, **kwargs)

    return method


def _tolist(self: torch.Tensor) -> Any:
    if place(self) == GPU:
        waits("tolist")
    else:
        host_reads(self, "tolist")
    with without_function_modes():
        return STOCK["tolist"](self)


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return STOCK["type"](self, *args, **kwargs)
    name = str(STOCK["type"](self)).replace("torch.cuda.", "torch.")
    return name.replace("torch.", "torch.cuda.", 1) if place(self) == GPU else name


def _storage_clone(self: Any) -> Any:
    copy = _stock_clone(self)
    copy.place = getattr(self, "place", CPU)
    return copy


def methods_of_tensors() -> None:
    tensor = _torch.Tensor
    tensor.device = property(device_of)
    tensor.is_cuda = property(lambda self: place(self) == GPU)
    tensor.is_cpu = property(lambda self: device_of(self).type == "cpu")
    tensor.get_device = lambda self: device_of(self).index if place(self) == GPU else -1
    tensor.to = moved_to
    tensor.cpu = lambda self, *args, **kwargs: moved_to(self, "cpu")
    tensor.cuda = lambda self, device=None, non_blocking=False, **kwargs: moved_to(
        self, "cuda", non_blocking=non_blocking
    )
    tensor.pin_memory = _pin
    tensor.is_pinned = lambda self, *args, **kwargs: is_pinned(self)
    tensor.numpy = _to_host("numpy")
    tensor.__array__ = _to_host("__array__")
    tensor.tolist = _tolist
    tensor.type = _type
    _torch.UntypedStorage.clone = _storage_clone
