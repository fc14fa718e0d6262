"""Sharing a step's teacher forward, with a teacher whose output shows what it was given."""

import pytest
import torch

from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers import Teacher
from megatron_moe_inject.teachers.forward import shared_forward


class Echo(Teacher):
    """Hidden state of a token: the token, its position, and how many it may attend to."""

    name, hidden_size, num_layers, vocab_size = "echo", 3, 7, 100
    logit_transform = LogitTransform()

    def __init__(self):
        self.batches = []

    def hidden_states(self, tokens, position_ids=None, attention_mask=None):
        return self.states(tokens, position_ids, attention_mask)[0]

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        self.batches.append(len(tokens))
        count, length = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(length).expand(count, length)
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        assert attention_mask.shape[0] in (1, count)
        seen = (~attention_mask).sum(-1)[:, 0].expand(count, length)
        last = torch.stack([tokens, position_ids, seen], -1).double()
        return [last, *(last + 1000 * (layer + 1) for layer in layers)]

    def head_weight(self, start, stop):
        return torch.zeros(stop - start, 3, dtype=torch.float64)


class Group:
    """Rank and size without communication; the all-gather is answered by the test."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def inputs(count: int, length: int = 6):
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(100, (count, length), generator=generator)
    positions = torch.randint(50, (count, length), generator=generator)
    mask = torch.rand(count, 1, length, length, generator=generator) > 0.5
    return tokens, positions, mask


def test_it_is_a_teacher():
    assert isinstance(Echo(), Teacher)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_alone(count):
    teacher = Echo()
    states, deeper = shared_forward(
        teacher, *inputs(count), group=None, max_sequences=4, layers=(2,)
    )
    assert torch.equal(deeper, states + 3000)
    assert states.shape == (count, 6, 3)
    assert states.dtype == torch.float64
    if count:
        assert torch.equal(states, Echo().hidden_states(*inputs(count)))
    assert sum(teacher.batches) == count
    assert max(teacher.batches, default=0) <= 4


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("one_mask", [False, True])
def test_shares_cover_everything_once_in_order(monkeypatch, size, count, one_mask):
    tokens, positions, mask = inputs(count)
    if one_mask:
        mask = inputs(1)[2]
    work = [Echo() for _ in range(size)]
    calls = []

    def gather_of(rank):
        def gather(output, mine, group):
            nth = calls.count(rank)
            calls.append(rank)
            assert group.rank() == rank
            sent[nth, rank] = mine.clone()
            if rank == size - 1:
                output.copy_(torch.cat([sent[nth, r] for r in range(size)]))

        return gather

    sent, layers = {}, (0, 4)
    results = []
    for rank in range(size):
        monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gather_of(rank))
        group = Group(rank, size)
        results.append(
            shared_forward(
                work[rank], tokens, positions, mask, group=group, max_sequences=2, layers=layers
            )
        )
    assert sum(sum(teacher.batches) for teacher in work) == count
    share = -(-count // size)
    assert all(sum(teacher.batches) <= share for teacher in work)
    assert calls == ([rank for rank in range(size) for _ in range(3)] if count else [])
    assert [states.shape for states in results[-1]] == [(count, 6, 3)] * 3
    if count:
        expected = Echo().states(tokens, positions, mask, layers)
        assert all(map(torch.equal, results[-1], expected))
