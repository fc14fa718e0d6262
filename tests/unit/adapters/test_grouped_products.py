"""The grouped products of adapters, which a GPU runs, here on a CPU."""

import torch
import torch.nn.functional as F

from megatron_moe_inject.adapters.grouped import OfExpert, grouped_products


def test_are_those_of_each_expert():
    drawn = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=drawn).bfloat16()

    rows = random(40, 16).requires_grad_()
    lengths = [8, 0, 24, 8]
    starts = [0, 8, 8, 32]
    parts = {
        OfExpert(i, i, 8, 0.5 * (i + 1), ""): slice(start, start + length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    }
    pairs = {one: (random(8, 16).requires_grad_(), random(24, 8).requires_grad_()) for one in parts}
    upstream = random(40, 24)
    torch.cat(list(grouped_products(rows, parts, pairs))).backward(upstream)
    found = [rows.grad.clone(), *(t.grad.clone() for pair in pairs.values() for t in pair)]
    rows.grad = None
    for pair in pairs.values():
        for tensor in pair:
            tensor.grad = None
    torch.cat(
        [
            F.linear(F.linear(rows[part].float(), a.float()), b.float()) * one.scale
            for (one, part), (a, b) in zip(parts.items(), pairs.values(), strict=True)
        ]
    ).backward(upstream.float())
    wanted = [rows.grad, *(t.grad for pair in pairs.values() for t in pair)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
