"""Each token of a step is found where a layer of its rank sees it, packed or not."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.host.own_tokens import OwnTokens

N, B, S = 2, 4, 12


def group(rank=0, size=1):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def own(packed, tp=(0, 1), cp=(0, 1)):
    groups = SimpleNamespace(tp=group(*tp), cp=group(*cp))
    return OwnTokens(groups, sequence_parallel=tp[1] > 1, packed=packed)


WHOLE = torch.arange(N * B * S).view(N, B, S)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_side_by_side(tp):
    parts = [own(False, (rank, tp)).of(WHOLE) for rank in range(tp)]
    assert torch.equal(torch.cat(parts, dim=1), WHOLE.transpose(1, 2))
    labels = WHOLE[..., 0]
    for part in parts:
        seen = OwnTokens.seen(own(False, (0, tp)).of_samples(labels, S)[1], part[1].shape)
        assert torch.equal(seen, labels[1].expand(S // tp, B))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_in_a_row(tp):
    """Rows of tokens, which MoE layers see as whole samples where they hold any."""
    labels, found = WHOLE[..., 0], []
    for rank in range(tp):
        tokens = own(True, (rank, tp))
        part = tokens.of(WHOLE)
        found.append(part)
        assert part.shape == (N, B * S // tp, 1)
        whole = B // tp
        seen = OwnTokens.seen(part[1], (S, whole))
        assert torch.equal(seen, part[1].view(whole, S).t())
        assert torch.equal(OwnTokens.as_row(seen), part[1])
        of_label = OwnTokens.seen(tokens.of_samples(labels, S)[1], (S, whole))
        assert torch.equal(of_label, labels[1, rank * whole : (rank + 1) * whole].expand(S, -1))
        samples = tokens.samples_of_row(B, B * S // tp)
        assert torch.equal(labels[1][samples], OwnTokens.as_row(of_label).squeeze(1))
    assert torch.equal(torch.cat(found, dim=1), WHOLE.view(N, -1, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_one_sample_in_parts(packed):
    """Context parallelism gives a piece from each end, tensor parallelism a part of both."""
    whole = WHOLE[:, :1]
    tokens = own(packed, (1, 2), (0, 3))
    part = tokens.of(tokens.of_rank(whole))
    assert part[0, :, 0].tolist() == [10, 11]
    assert tokens.of_samples(whole[..., 0], 4).shape == (N, 1, 1)
