"""The grouped products of adapters, which a GPU runs, here on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moe_inject.adapters.blocks import OfDomain
from megatron_moe_inject.adapters.grouped import OfExpert, grouped_products

DOMAINS = (OfDomain(2, "code"), OfDomain(0, "html"))


@pytest.mark.parametrize("domains", [(), DOMAINS], ids=["all tokens", "by domain"])
def test_are_those_of_each_expert(domains):
    drawn = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=drawn).bfloat16()

    rows = random(40, 16).requires_grad_()
    lengths = [8, 0, 24, 8]
    starts = [0, 8, 8, 32]
    parts = {
        OfExpert(i, i, 8, 0.5 * (i + 1), "", domains): slice(start, start + length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    }
    width = 8 * max(1, len(domains))
    pairs = {
        one: (random(width, 16).requires_grad_(), random(24, width).requires_grad_())
        for one in parts
    }
    upstream, mask, labels = random(40, 24), torch.ones(40, width), None
    if domains:
        of_rows = torch.randint(-1, 3, (40,), generator=drawn).float()
        labels = (of_rows, torch.tensor([domain.label for domain in domains]))
        of_columns = labels[1].repeat_interleave(8)
        mask = (of_rows.unsqueeze(1) == of_columns).float()
        assert 0 < mask.sum() < mask.numel() / 2
    torch.cat(list(grouped_products(rows, parts, pairs, labels))).backward(upstream)
    found = [rows.grad.clone(), *(t.grad.clone() for pair in pairs.values() for t in pair)]
    rows.grad = None
    for pair in pairs.values():
        for tensor in pair:
            tensor.grad = None
    torch.cat(
        [
            F.linear(F.linear(rows[part].float(), a.float()) * mask[part], b.float()) * one.scale
            for (one, part), (a, b) in zip(parts.items(), pairs.values(), strict=True)
        ]
    ).backward(upstream.float())
    wanted = [rows.grad, *(t.grad for pair in pairs.values() for t in pair)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
