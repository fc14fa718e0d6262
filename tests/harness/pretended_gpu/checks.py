"""Run by a test on the CPU lane: the pretended GPU does what a device would, call by call."""

import copy
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_moe_inject.host.to_device import STAGED_BYTES, to_device
from tests.harness.pretended_gpu.machine import install
from tests.harness.pretended_gpu.reports import counted

CUDA = "cuda"


def refused(action, says: str, error: type[Exception] = RuntimeError) -> None:
    with pytest.raises(error, match=says):
        action()


def waited(action) -> list[str]:
    """Why the host waited, once for each time."""
    with counted() as found:
        action()
    return sorted(re.search(r"\((.*)\)$", key)[1] for key in found.elements())


def check_places():
    x = torch.zeros(3, device=CUDA)
    made = [
        *(x[1:], x + 1, x.detach(), x.to(torch.bfloat16), torch.zeros_like(x), x.new_zeros(2)),
        *(
            torch.cat([x, x]),
            x.new_tensor([1.0]),
            torch.arange(3, device=x.device),
            copy.deepcopy(x),
        ),
        *(torch.tensor([1], device=torch.cuda.current_device()), torch.ones(2).cuda()),
        *(torch.ones(2).to(x), F.one_hot(torch.zeros(2, dtype=torch.int64, device=CUDA), 4)),
        torch.nn.Linear(2, 2).to(device=torch.device(CUDA), dtype=torch.bfloat16).weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cuda"}
    assert all(tensor.is_cuda and tensor.type().startswith("torch.cuda.") for tensor in made)
    host = [torch.zeros(3), x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), x.cpu() + 1]
    assert {tensor.device.type for tensor in host} == {"cpu"}
    assert torch.zeros(2).type() == "torch.FloatTensor"


def check_mixes():
    x, y = torch.zeros(3, device=CUDA), torch.zeros(3)
    both = "at least two devices"
    for action in (lambda: x + y, lambda: y.add_(x), lambda: torch.cat([x, y]), lambda: y @ x):
        refused(action, both)
    refused(lambda: torch.zeros(()).add_(x.sum()), both)
    refused(lambda: x.gather(0, torch.zeros(1, dtype=torch.int64)), both)
    refused(lambda: y[torch.zeros(1, dtype=torch.int64, device=CUDA)], "indices should be")
    refused(lambda: x.numpy(), "to numpy", TypeError)
    assert (x + torch.tensor(2.0)).is_cuda
    assert torch.where(x > 0, x, torch.tensor(0.0)).is_cuda
    assert x.copy_(y) is x
    assert x.is_cuda


def check_waits():
    x, y = torch.zeros(3, device=CUDA), torch.zeros(3)
    pinned, large = y.pin_memory(), torch.zeros(STAGED_BYTES)
    copied, late = "to: a copy", "to: an asynchronous copy of memory that is not pinned"
    for action, reasons in (
        (lambda: x.sum().item(), ["_local_scalar_dense"]),
        (lambda: bool(x.any()), ["_local_scalar_dense"]),
        (lambda: x.tolist(), ["tolist"]),
        (lambda: x.cpu(), [f"{copied} from the GPU"]),
        (lambda: y.cuda(), [f"{copied} to the GPU"]),
        (lambda: pinned.to(CUDA), [f"{copied} to the GPU"]),
        (lambda: y.to(CUDA, non_blocking=True), [late]),
        (lambda: pinned.to(CUDA, torch.float64, non_blocking=True), [late]),
        (lambda: pinned.to(CUDA, non_blocking=True), []),
        (lambda: x.to("cpu", non_blocking=True), []),
        (lambda: torch.tensor([1], device=CUDA), ["a tensor of the host's numbers"]),
        (lambda: x[[0, 1]], ["an index on the CPU"]),
        (lambda: x[x > 0], ["a mask as an index"]),
        (lambda: x.masked_fill(x > 0, 1.0), []),
        (lambda: x.masked_fill(x > 0, x.sum()), ["masked_fill: the value is a tensor"]),
        (lambda: x.nonzero(), ["nonzero"]),
        (lambda: torch.nonzero_static(x, size=1), []),
        (lambda: torch.repeat_interleave(x.long()), ["repeat_interleave"]),
        (lambda: torch.repeat_interleave(x.long(), output_size=0), []),
        (lambda: F.one_hot(x.long(), 2), []),
        (lambda: torch.full((2,), 1.0, device=CUDA), []),
        (lambda: torch.cuda.synchronize(), ["the device"]),
        (lambda: to_device(y, torch.device(CUDA)), []),
        (lambda: to_device(large, torch.device(CUDA)), []),
        (lambda: large.to(CUDA, non_blocking=True), [late]),
    ):
        found = waited(action)
        assert len(found) == len(reasons), (found, reasons)
        assert all(map(str.startswith, found, reasons)), (found, reasons)


def check_gradients():
    layer = torch.nn.Linear(3, 5).cuda()
    x = torch.randn(4, 3, device=CUDA, requires_grad=True)
    F.cross_entropy(layer(x), torch.arange(4, device=CUDA)).backward()
    q = torch.randn(2, 4, 5, 8, device=CUDA, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    w = torch.randn(3, device=CUDA, requires_grad=True)
    checkpoint(lambda t: (t * torch.ones(3, device=CUDA)).sum(), w, use_reentrant=True).backward()
    assert all(tensor.grad.is_cuda for tensor in (layer.weight, layer.bias, x, q, w))
    leaf = torch.randn(3, requires_grad=True)
    (leaf.cuda() * 2).sum().backward()
    assert leaf.grad.tolist() == [2.0] * 3
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].is_cuda


def check_what_nobody_has_set():
    assert torch.empty(2, device=CUDA).isnan().all()
    assert torch.empty(2, dtype=torch.int64).max() < 0
    landing = torch.ones(3, device=CUDA).to("cpu", non_blocking=True)
    refused(lambda: landing.sum(), "may not have reached")
    refused(lambda: landing.numpy(), "may not have reached")
    torch.cuda.current_stream().synchronize()
    assert landing.sum() == 3


def check_groups():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    x, y = torch.ones(3, device=CUDA), torch.ones(3)
    host, device = dist.new_group(backend="gloo"), dist.new_group()
    dist.all_reduce(x)
    dist.all_reduce(x, group=device)
    dist.all_reduce(y, group=host)
    refused(lambda: dist.all_reduce(y), "of a device group got a tensor on the cpu")
    refused(lambda: dist.all_reduce(y, group=device), "device group")
    refused(lambda: dist.all_reduce(x, group=host), "host group got a tensor on the gpu")
    said = [None]
    assert waited(lambda: dist.all_gather_object(said, 1, group=host)) == []
    assert waited(lambda: dist.all_gather_object(said, 1))
    assert waited(dist.barrier) == ["a barrier of a device group"]
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["MASTER_PORT"] = sys.argv[-1]
    install()
    check_places()
    check_mixes()
    check_waits()
    check_gradients()
    check_what_nobody_has_set()
    check_groups()
    print("all checks of the pretended GPU passed")
