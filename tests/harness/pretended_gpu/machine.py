"""The rest of a machine with a GPU: groups, streams, events, loaders; and ``install``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.cpu_lane import torch_device
from megatron_moe_inject.losses import triton_rows
from tests.harness.pretended_gpu.copies import methods_of_tensors
from tests.harness.pretended_gpu.operations import Calls, Operations, of_torch
from tests.harness.pretended_gpu.places import state, storage_of, tensors_in, waits

_torch: Any = torch


def _groups() -> None:
    module: Any = dist.distributed_c10d
    stock = module.new_group

    @functools.wraps(stock)
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args, **kwargs):
        host = backend == "gloo"
        group = stock(ranks, timeout, "gloo", *args, **kwargs)
        if host and isinstance(group, dist.ProcessGroup):
            state.on_host.add(group.group_name)
        return group

    module.new_group = _torch.distributed.new_group = new_group
    _torch.distributed.get_backend_config = lambda group=None: "cuda:nccl"

    def device_of_objects(group: Any = None) -> str:
        named = group or dist.group.WORLD
        return "cpu" if named.group_name in state.on_host else "cuda"

    module._get_object_coll_device = device_of_objects


# Streams, events, loaders


def _device_calls() -> None:
    class Event(torch_device.Event):
        def synchronize(self) -> None:
            waits("an event")

        def query(self) -> bool:
            state.landed += 1  # what was copied before it has arrived
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
        for tensor in tensors_in((data,)) if self.pins else ():
            storage_of(tensor).pinned = True
        return data

    iterator.__init__, iterator._next_data = init, next_data


def _no_kernels() -> None:
    """What ``triton_rows`` has where Triton cannot be imported."""


def _stock_makers() -> None:
    """The lane's makers of tensors would turn ``device="cuda"`` to the CPU before ``Calls``."""
    for owner, names in torch_device.MAKERS:
        for name in names.split():
            setattr(owner, name, of_torch(getattr(owner, name)))


def _backward_keeps_calls() -> None:
    """Recompute runs forward code in backward, where torch suspends ``Calls`` as it dispatches."""

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
    methods_of_tensors()
    _backward_keeps_calls()
    _device_calls()
    _groups()
    _loaders_pin()
    _megatron()
    triton_rows._triton_rows = _no_kernels
    Calls().__enter__()
    Operations().__enter__()
