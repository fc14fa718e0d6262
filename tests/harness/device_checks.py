"""Run by a test on the CPU lane: what ``torch.cuda`` stands for there must behave like a device."""

import sys

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.utils._device import _device_constructors

from megatron_moe_inject.host import cpu_lane
from megatron_moe_inject.host.cpu_lane import torch_device
from megatron_moe_inject.host.cpu_lane.context_parallel import zigzag_positions
from megatron_moe_inject.host.cpu_lane.packed import hidden_pairs


def check_random_states():
    tracker = CudaRNGStatesTracker()
    tracker.add("one", 11)
    torch.manual_seed(7)
    outside = torch.cuda.get_rng_state()
    with tracker.fork("one"):
        first = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), outside)
    with tracker.fork("one"):
        assert not torch.equal(torch.rand(4), first)
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(outside)
    assert torch.equal(torch.rand(4), drawn)
    torch.cuda.manual_seed(11)
    assert torch.equal(torch.rand(4), first)


def check_devices():
    here = torch.cuda.current_device()
    made = [
        torch.empty(2, device=here),
        torch.zeros(2, device="cuda"),
        torch.tensor([1], device=torch.device("cuda", here)),
        torch.ones(2, device=f"cuda:{here}", pin_memory=True),
        torch.ones(2).to(here),
        torch.ones(2).to("cuda", non_blocking=True),
        torch.ones(2).to(device="cuda").cuda().pin_memory(),
        torch.nn.Linear(2, 2, device="cuda").cuda(here).weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.ones(2).to(torch.bfloat16).dtype is torch.bfloat16
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert torch.empty(2, device="meta").device.type == "meta"


def check_every_maker():
    """Whatever torch itself takes for a function that makes tensors, and what its names say."""
    ours = {(owner, name) for owner, names in torch_device.MAKERS for name in names.split()}
    ours |= {(torch.Tensor, "to")}
    replaced = {getattr(owner, name).__wrapped__ for owner, name in ours}
    assert _device_constructors() - replaced == set()
    named = {(torch, name) for name in dir(torch) if name.endswith("_like")}
    named |= {(torch.Tensor, name) for name in dir(torch.Tensor) if name.startswith("new_")}
    assert named - ours == set()
    one, here = torch.ones(2), torch.cuda.current_device()
    made = [
        *(make(one, device=here) for make in (torch.zeros_like, torch.randn_like)),
        *(torch.full_like(one, 2, device="cuda"), torch.normal(0.0, 1.0, (2,), device="cuda")),
        *(one.new_zeros(2, device="cuda"), one.new_tensor([1], device=here)),
        *(torch.arange(3, device="cuda"), torch.randperm(3, device="cuda"), torch.eye(2).to(here)),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


class DoubleOnDevice(torch.autograd.Function):
    """Makes a tensor "on the GPU" in backward, as recomputed layers do."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full((), 2.0, device=torch.cuda.current_device())


def check_devices_inside_backward():
    for run_backward in (torch.Tensor.backward, torch.autograd.backward):
        x = torch.ones(3, requires_grad=True)
        run_backward(DoubleOnDevice.apply(x).sum())
        assert x.grad.tolist() == [2.0] * 3
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(DoubleOnDevice.apply(x).sum(), x)
    assert grad.tolist() == [2.0] * 3


def check_types_streams_and_memory():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype is torch.int64
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        sum(range(1000))
    end.record()
    assert start.elapsed_time(end) > 0
    torch.ones(1).record_stream(torch.cuda.current_stream())
    held = torch.cuda.memory_allocated()
    ballast = torch.ones(64 << 20, dtype=torch.uint8)
    assert torch.cuda.memory_allocated() - held > 0.9 * ballast.numel()
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() * 0.9


def check_attention_helpers():
    assert zigzag_positions(2, 8).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag_positions(1, 4).tolist() == [[0, 1, 2, 3]]
    hidden = hidden_pairs(torch.tensor([0, 2, 5], dtype=torch.int32), 5)
    visible = [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert [row.logical_not().nonzero().flatten().tolist() for row in hidden] == visible


def check_second_enable_changes_nothing():
    before = torch.Tensor.type, torch.cuda.current_device, DotProductAttention.forward
    cpu_lane.enable()
    assert (torch.Tensor.type, torch.cuda.current_device, DotProductAttention.forward) == before


def check_packages_for_gpus_are_out_of_sight():
    for name in ("transformer_engine", "apex"):
        assert sys.modules[name] is None, "Megatron would use its kernels"


if __name__ == "__main__":
    check_packages_for_gpus_are_out_of_sight()
    check_random_states()
    check_devices()
    check_every_maker()
    check_devices_inside_backward()
    check_types_streams_and_memory()
    check_attention_helpers()
    check_second_enable_changes_nothing()
    print("all device checks passed")
