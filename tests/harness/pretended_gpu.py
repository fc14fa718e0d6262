"""A GPU that is pretended: the CPU lane, on which each tensor has a place as if there were one.

On the lane a tensor "on the GPU" is a CPU tensor like any other, so nothing shows that a factory
lacks its ``device=``, nor that the host waits for a number. Here the storage of a tensor that would
lie on the GPU is marked. Views, ``.data``, optimizers, autograd and gloo keep storages as they are,
so the mark follows the values everywhere, and the numbers of a run are the lane's. A mode that sees
every operation then does what a device would:

- an operation whose tensors lie in two places raises what torch raises, by the rules of
  ``torch._subclasses.fake_tensor``: CPU tensors without a dimension, and indices, may come along;
- new tensors lie where their ``device=``, or what they are made of, says; those of ``torch.empty``
  hold NaN, or a number that no index has;
- a collective over a device group (Megatron's default) wants tensors on the GPU, one over a group
  made with ``backend="gloo"`` tensors on the CPU;
- what makes the host wait for the device (``pretended_rules``) is counted by the line that asked;
- a CPU tensor that a copy may not have reached yet must not be read.

Not seen: work of other threads, streams that do not wait for each other, memory, kernels (Triton is
off), and waits inside Transformer Engine, Apex or NCCL.

``install()`` in a process with the CPU lane; ``runner`` does where ``TESTS_PRETENDED_GPU`` is set
(``ENV``), also for all runs of ``TESTS_PRETENDED_GPU=1 pytest ...``; ``steady_waits`` reads what
such a run printed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_inject.host.cpu_lane import torch_device
from megatron_moe_inject.host.to_device import STAGED_BYTES
from megatron_moe_inject.losses import triton_rows
from tests.harness import pretended_rules as rules

ENV = {"TESTS_PRETENDED_GPU": "1"}
"""Of a run on the pretended GPU."""
PREFIX = "pretended gpu: "
CPU, GPU, EITHER = "cpu", "gpu", "either"
"""Places. ``EITHER`` has what torch's own C++ code made of a tensor's options, of which the place
is not known: the first operation with another tensor decides."""

_BY_SIZE = "megatron_moe_inject/host/to_device.py"
"""Pins what is large. Tests are small, so that elsewhere every size counts."""
_STAND_INS = "megatron_moe_inject/host/cpu_lane/"
_torch: Any = torch
_without_function_modes = torch._C.DisableTorchFunction
_HERE = (os.path.dirname(torch.__file__), __file__, rules.__file__, torch_device.__file__)
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class _State:
    """What is going on in this process.

    Attributes:
        waits: how often each line made the host wait, and why.
        flights: of the calls into torch that are under way, what they say of new tensors' place.
        moving: the place that a copy goes to.
        landed: counts the host's waits: what was copied before the last one has arrived.
        on_host: names of groups of the host.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.flights: list[str] = []
        self.moving: str | None = None
        self.landed = 0
        self.on_host: set[str] = set()


_state = _State()


def place(tensor: torch.Tensor) -> str:
    """Where a tensor lies; a quantised one of Transformer Engine's kind, where its codes do."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        tensor = tensor.__dict__.get("_rowwise_data", tensor)
    return getattr(_storage(tensor), "place", CPU)


def _storage(tensor: torch.Tensor) -> Any:
    with _without_function_modes():
        return torch._C.TensorBase.untyped_storage(tensor)


def put(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Say where a new tensor lies."""
    _storage(tensor).place = where
    return tensor


def _is_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _place_of(device: Any) -> str:
    return GPU if _is_gpu(device) else CPU


def _device(tensor: torch.Tensor) -> torch.device:
    if place(tensor) == GPU:
        return torch.device("cuda", torch.cuda.current_device())
    with _without_function_modes():
        return _stock["device"].__get__(tensor)


# What the host waits for, and who asked


def _line() -> str:
    """The line of the innermost frame that is neither torch's nor of this harness."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    name = frame.f_code.co_filename
    packages = os.path.dirname(os.path.dirname(torch.__file__))  # may lie below the root
    for root in (packages, _ROOT):
        name = name.removeprefix(root + os.sep)
    return f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}"


def waits(why: str) -> None:
    """The host waits for the device."""
    line = _line()
    if not line.startswith(_STAND_INS):
        _state.waits[f"{line} ({why})"] += 1
    _state.landed += 1


def _fault(message: str) -> None:
    """What a GPU would not do. ``TESTS_PRETENDED_GPU=record`` goes on, and says all of them."""
    if os.environ.get("TESTS_PRETENDED_GPU") != "record":
        raise RuntimeError(f"{message} [{_line()}]")
    print(f"{PREFIX}fault: {message} [{_line()}]", flush=True)


def _read(tensor: torch.Tensor, what: str) -> None:
    """The host reads the values of a CPU tensor."""
    if getattr(_storage(tensor), "lands", -1) == _state.landed:
        _fault(f"{what} reads a CPU tensor that an asynchronous copy may not have reached yet")


# Copies between the places


def _copies(
    source: str, target: str, non_blocking: bool, pinned: bool, size: int, what: str
) -> None:
    """Count the wait of a copy from the GPU or to it, if it is one."""
    if source == target or EITHER in (source, target):
        return
    if not non_blocking:
        waits(f"{what}: a copy {'from' if source == GPU else 'to'} the GPU")
    elif not pinned and not (_line().startswith(_BY_SIZE) and size <= STAGED_BYTES):
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
        _read(x, "a copy")
    before, _state.moving = _state.moving, where
    try:
        out = _stock["to"](x, non_blocking=non_blocking, copy=True, **kw)
    finally:
        _state.moving = before
    at = place(x)
    # torch itself pins what an asynchronous copy to the CPU makes. What it also converts, or
    # arranges, it copies from memory that is not pinned.
    as_it_is = out.dtype == x.dtype and out.stride() == x.stride()
    _copies(at, where, non_blocking, at == GPU or (_pinned(x) and as_it_is), x.nbytes, "to")
    if where == CPU and non_blocking:
        storage = _storage(out)
        storage.pinned, storage.lands = True, _state.landed
    return out


def _pinned(tensor: torch.Tensor) -> bool:
    return getattr(_storage(tensor), "pinned", False)


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = dict(kwargs)
    if args and isinstance(args[0], torch.Tensor):
        other = args[0]
        args, kwargs = (_device(other), other.dtype, *args[1:]), kwargs
    if "other" in kwargs:
        other = kwargs.pop("other")
        args = (_device(other), other.dtype)
    copy = kwargs.pop("copy", False) or (len(args) == 4 and args[3])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args[:3], **kwargs)
    kw: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if layout is not None:
        kw["memory_format"] = layout
    at = place(self)
    if (device is not None and device.type == "meta") or self.is_meta:
        return _stock["to"](self, device or "meta", copy=copy, **kw)
    where = at if device is None else _place_of(device)
    if at == EITHER:
        put(self, where)
        at = where
    if where == at:
        return _stock["to"](self, copy=copy, non_blocking=non_blocking, **kw)
    if self.requires_grad and torch.is_grad_enabled():
        return _Move.apply(self, where, non_blocking, kw)
    return _moved(self, where, non_blocking, kw)


def _pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    if place(self) == GPU:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
    if _pinned(self):
        return self
    out = self.detach().clone()
    _storage(out).pinned = True
    return out


# Methods of tensors

_stock: dict[str, Any] = {
    name: getattr(torch.Tensor, name)
    for name in (
        *("device", "is_cuda", "is_cpu", "to", "numpy", "tolist", "type", "__array__"),
        *("pin_memory", "is_pinned", "get_device", "new_tensor"),
    )
}
_stock_clone = torch.UntypedStorage.clone


def _to_host(what: str) -> Callable[..., Any]:
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if place(self) == GPU:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                f"tensor to host memory first. [{_line()}]"
            )
        if not _line().startswith("megatron/"):  # which looks at the array once it has waited
            _read(self, what)
        with _without_function_modes():
            return _stock[what](self, *args, **kwargs)

    return method


def _tolist(self: torch.Tensor) -> Any:
    if place(self) == GPU:
        waits("tolist")
    else:
        _read(self, "tolist")
    with _without_function_modes():
        return _stock["tolist"](self)


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return _stock["type"](self, *args, **kwargs)
    name = str(_stock["type"](self)).replace("torch.cuda.", "torch.")
    return name.replace("torch.", "torch.cuda.", 1) if place(self) == GPU else name


def _storage_clone(self: Any) -> Any:
    copy = _stock_clone(self)
    copy.place = getattr(self, "place", CPU)
    return copy


def _tensor_methods() -> None:
    tensor = _torch.Tensor
    tensor.device = property(_device)
    tensor.is_cuda = property(lambda self: place(self) == GPU)
    tensor.is_cpu = property(lambda self: _device(self).type == "cpu")
    tensor.get_device = lambda self: _device(self).index if place(self) == GPU else -1
    tensor.to = _to
    tensor.cpu = lambda self, *args, **kwargs: _to(self, "cpu")
    tensor.cuda = lambda self, device=None, non_blocking=False, **kwargs: _to(
        self, "cuda", non_blocking=non_blocking
    )
    tensor.pin_memory = _pin
    tensor.is_pinned = lambda self, *args, **kwargs: _pinned(self)
    tensor.numpy = _to_host("numpy")
    tensor.__array__ = _to_host("__array__")
    tensor.tolist = _tolist
    tensor.type = _type
    _torch.UntypedStorage.clone = _storage_clone


# Calls of torch's functions: what their arguments say of the place


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple) or isinstance(value, list | tuple):
            found += _tensors(value)
        elif isinstance(value, dict) and value:
            found += _tensors(value.values())
    return found


@functools.cache
def _name(func: Any) -> str:
    return func._schema.name


@functools.cache
def _writes_first(func: Any) -> bool:
    """Whether an operation changes its first tensor."""
    arguments = func._schema.arguments
    return bool(arguments and arguments[0].alias_info and arguments[0].alias_info.is_write)


def _of_torch(function: Any) -> Any:
    """torch's own where the lane has put a stand-in."""
    return getattr(function, "__wrapped__", function)


_FROM_DATA = tuple(
    map(_of_torch, (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor))
)
_SET = torch.Tensor.__setitem__


class _Calls(TorchFunctionMode):
    """Knows what ``device=`` a call names, and where its tensors are, while it goes on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:
            with _without_function_modes():
                return func(*args, **kwargs)
        if func in _FROM_DATA:
            return _from_data(func, args, kwargs)
        device, flight = kwargs.get("device"), ""
        pins = bool(kwargs.pop("pin_memory", False))
        if device is not None:
            if isinstance(device, str | torch.device) and str(device).startswith("meta"):
                return func(*args, **kwargs)
            flight = _place_of(device)
            if flight == GPU:
                kwargs["device"] = torch.device("cpu")
        elif any(place(tensor) == GPU for tensor in _tensors((args, kwargs))):
            flight = "set" if func is _SET else "of tensors"
            if func is torch.nn.functional.one_hot and len(args) + len(kwargs) > 1:
                flight = "checks"
        _state.flights.append(flight)
        try:
            out = func(*args, **kwargs)
        finally:
            _state.flights.pop()
        if pins:
            _storage(out).pinned = True
        return out


def _from_data(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.tensor`` and its like: a copy of the host's numbers, for which it waits."""
    method = func is torch.Tensor.new_tensor
    data = args[1 if method else 0] if len(args) > method else kwargs["data"]
    pins = bool(kwargs.pop("pin_memory", False))
    device = kwargs.pop("device", None)
    held = isinstance(data, torch.Tensor)
    at = place(data) if held else CPU
    where = _place_of(device) if device is not None else at if held or not method else GPU
    if device is not None and str(device).startswith("meta"):
        return func(*args, device=device, **kwargs)
    if held and at != where:
        return _to(data, "cuda" if where == GPU else "cpu", kwargs.get("dtype"))
    with _without_function_modes():
        out = func(*args, **kwargs)
    if not held and where == GPU:
        out = put(out.clone(), GPU)
        waits("a tensor of the host's numbers")
    elif held and where == GPU:
        put(out, GPU)
    if pins:
        _storage(out).pinned = True
    return out


# Operations


class _Operations(TorchDispatchMode):
    """Sees every operation, also of autograd's backward passes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # it runs operations of its own, which are seen
        with _without_function_modes():
            return _operate(func, args, kwargs or {})


def _operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    inputs = _tensors((args, kwargs))
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
            _read(tensor, name)
    if where == GPU and "checks" not in _state.flights[-1:]:
        why = rules.waits(name, func, args, kwargs)
        if why and not (name == "aten::masked_fill" and place(args[2]) == CPU):
            waits(why)
    out = func(*args, **kwargs)
    if where != CPU:
        for tensor in _tensors((out,)):
            storage = _storage(tensor)
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
            _fault(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({_name(func)}: "
                f"{[(list(x.shape), place(x)) for x in inputs]})"
            )
    return GPU


def _made(kwargs: dict[str, Any], of: str) -> str:
    """Where a new tensor lies: by the call's ``device=``, else as what it is made like."""
    flight = _state.flights[-1] if _state.flights else EITHER
    if flight in (CPU, GPU):
        return flight
    if of == GPU or kwargs.get("device") is None or flight in ("", "set"):
        return of
    # Made in C++ by the options of a tensor.
    return EITHER if flight == EITHER else GPU


def _copied(name: str, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> str:
    if name == "aten::_to_copy":
        return _state.moving or place(args[0])
    for target, source in _pairs(name, args):
        to, at = place(target), place(source)
        if to == EITHER and at != EITHER:
            put(target, at)
            to = at
        if at == CPU:
            _read(source, "copy_")
        late = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        small = at == CPU and source.dim() == 0 and "fill" in name
        if not small:
            pinned = _pinned(source) if at == CPU else _pinned(target)
            _copies(at, to, late, pinned, source.nbytes, name.partition("::")[2])
        if late and at == GPU and to == CPU:
            _storage(target).lands = _state.landed
    return CPU


def _pairs(name: str, args: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(*args[:2], strict=True) if "foreach" in name else [(args[0], args[1])]


def _indexed(name: str, args: Any) -> str:
    """An index may come from the host, which waits while it is copied."""
    at = place(args[0])
    values = _tensors(args[2:3])
    indices = _tensors(args[1])
    for index in indices:
        if at == GPU and place(index) == CPU:
            waits("an index on the CPU")
        elif at == CPU and place(index) == GPU:
            _fault("indices should be either on cpu or on the same device as the indexed tensor")
    filled = "put" in name and all(place(x) == CPU and x.numel() == 1 for x in values)
    if at == GPU and not filled and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
        waits("a mask as an index")
    for value in values:
        if place(value) not in (at, EITHER) and not (place(value) == CPU and value.dim() == 0):
            _fault(f"{name}: the values lie on another device than what is indexed")
    return at


_POISON = -7_777_777


def _poison(out: Any) -> None:
    """What nobody has set must not be read."""
    for tensor in _tensors((out,)):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(_POISON)


# Groups


def _collective(name: str, args: Any, inputs: list[torch.Tensor]) -> None:
    group = next((_unboxed(value) for value in args if isinstance(value, torch.ScriptObject)), None)
    host = group is not None and group.group_name in _state.on_host
    if name == "c10d::barrier":
        if not host:
            waits("a barrier of a device group")
        return
    for tensor in inputs:
        at = place(tensor)
        if tensor.numel() and at != EITHER and (at == CPU) != host:
            _fault(f"{name} of a {'host' if host else 'device'} group got a tensor on the {at}")
        if at == CPU:
            _read(tensor, name)


def _unboxed(value: Any) -> Any:
    try:
        return dist.ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):
        return None


def _groups() -> None:
    module: Any = dist.distributed_c10d
    stock = module.new_group

    @functools.wraps(stock)
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args, **kwargs):
        host = backend == "gloo"
        group = stock(ranks, timeout, "gloo", *args, **kwargs)
        if host and isinstance(group, dist.ProcessGroup):
            _state.on_host.add(group.group_name)
        return group

    module.new_group = _torch.distributed.new_group = new_group
    _torch.distributed.get_backend_config = lambda group=None: "cuda:nccl"

    def device_of_objects(group: Any = None) -> str:
        named = group or dist.group.WORLD
        return "cpu" if named.group_name in _state.on_host else "cuda"

    module._get_object_coll_device = device_of_objects


# Streams, events, loaders


def _device_calls() -> None:
    class Event(torch_device.Event):
        def synchronize(self) -> None:
            waits("an event")

        def query(self) -> bool:
            _state.landed += 1  # what was copied before it has arrived
            return True

    class Stream(torch_device.Stream):
        def synchronize(self) -> None:
            waits("a stream")

        def record_event(self, event: Any = None) -> Any:
            return super().record_event(event or Event())

    cuda = _torch.cuda
    cuda.Event, cuda.Stream = Event, Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.synchronize = lambda device=None: waits("the device")
    cuda._exchange_device = cuda._maybe_exchange_device = lambda device: cuda.current_device()


def _loaders_pin() -> None:
    """As on a machine with a GPU, where Megatron's loaders hand out pinned memory."""
    from torch.utils.data import dataloader

    iterator: Any = dataloader._SingleProcessDataLoaderIter
    stock_init, stock_next = iterator.__init__, iterator._next_data

    def init(self: Any, loader: Any) -> None:
        stock_init(self, loader)
        self.pins = loader.pin_memory

    def next_data(self: Any) -> Any:
        data = stock_next(self)
        for tensor in _tensors((data,)) if self.pins else ():
            _storage(tensor).pinned = True
        return data

    iterator.__init__, iterator._next_data = init, next_data


def _no_kernels() -> None:
    """What ``triton_rows`` has where Triton cannot be imported."""


def _stock_makers() -> None:
    """The lane's makers of tensors would turn ``device="cuda"`` to the CPU before ``_Calls``."""
    for owner, names in torch_device.MAKERS:
        for name in names.split():
            setattr(owner, name, _of_torch(getattr(owner, name)))


def _backward_keeps_calls() -> None:
    """Recompute runs forward code in backward, where torch suspends ``_Calls`` as it dispatches."""

    def backward(
        self: torch.Tensor,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    _torch.autograd.has_torch_function = lambda tensors: False
    _torch.Tensor.backward = backward


def _megatron() -> None:
    """Stock again where the lane answers for a CPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for module in (moe_utils, token_dispatcher):
        lane = module.maybe_move_tensor_to_cpu
        module.maybe_move_tensor_to_cpu = getattr(lane, "__wrapped__", lane)


def install() -> None:
    """Pretend, for the rest of this process, which has the CPU lane enabled."""
    _stock_makers()
    _tensor_methods()
    _backward_keeps_calls()
    _device_calls()
    _groups()
    _loaders_pin()
    _megatron()
    triton_rows._triton_rows = _no_kernels
    _Calls().__enter__()
    _Operations().__enter__()


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The waits inside, by line and reason."""
    before, _state.waits = _state.waits, Counter()
    try:
        yield _state.waits
    finally:
        before.update(_state.waits)
        _state.waits = before


def report_steps(training: Any) -> None:
    """Each rank prints the waits of each training step as it ends."""
    stock = training.train_step
    number = 0

    @functools.wraps(stock)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        with counted() as found:
            result = stock(*args, **kwargs)
        print(f"{PREFIX}step {number} {json.dumps(found)}", flush=True)
        return result

    training.train_step = train_step


def steps_of(output: str) -> list[dict[str, int]]:
    """What a run printed of its steps, rank by rank: waits by line and reason."""
    lines = [line for line in output.splitlines() if line.startswith(f"{PREFIX}step ")]
    return [json.loads(line.split(" ", 4)[4]) for line in lines]


def steady_waits(output: str, ranks: int = 1) -> Counter[tuple[str, str]]:
    """Of the last step of each rank, how often which function of which file waited; the most of
    any rank."""
    steps = steps_of(output)
    assert steps, f"no step was reported:\n{output[-2000:]}"
    assert len(steps) % ranks == 0, "every rank ends in its last step"
    per_rank, most = len(steps) // ranks, Counter()
    for rank in range(ranks):
        found: Counter[tuple[str, str]] = Counter()
        for line, times in steps[(rank + 1) * per_rank - 1].items():
            where, function = line.split(" (")[0].split(" ", 1)
            found[where.rpartition(":")[0], function] += times
        most |= found
    return most
