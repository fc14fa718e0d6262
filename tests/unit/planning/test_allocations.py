"""What is counted while operations run on meta tensors."""

import torch

from megatron_moe_inject.planning.allocations import Allocations, Saved

MIB = 2**20


def new() -> torch.Tensor:
    return torch.empty(MIB, dtype=torch.uint8, device="meta")


def test_storages_count_once_and_until_nothing_holds_them():
    known = new()
    with Allocations([known]) as allocations:
        view = known[:10].view(2, 5)
        assert allocations.now == 0
        first = new()
        other = first[5:]
        second = first + 1
        assert allocations.now == 2 * MIB
        del first
        assert allocations.now == 2 * MIB
        del other, second
        assert (allocations.now, allocations.peak) == (0, 2 * MIB)
        allocations.forget_peak()
        third = new()
        assert allocations.peak == MIB
    assert len(view) == 2
    assert len(third) == MIB


def test_what_autograd_saves_is_held_until_its_backward_pass():
    weight = torch.empty(4, 4, device="meta", requires_grad=True)
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    saved = Saved([weight])
    with Allocations([weight, x]) as allocations:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            y = (x @ weight).exp()
        assert saved.bytes == 2 * 8 * 4 * 4
        assert allocations.now == 8 * 4 * 4
        y.backward(torch.empty_like(y))
        del y
        assert allocations.now == (8 * 4 + 4 * 4) * 4
