"""A teacher reads each document of a pack by itself, whatever its length and its neighbours."""

import pytest
import torch

from megatron_moe_inject.teachers import Teacher
from megatron_moe_inject.teachers.documents import document_forward, plan_rows
from megatron_moe_inject.teachers.prefix import PrefixedTeacher


class Recurrent(Teacher):
    """A causal teacher whose states tell everything that was read, in which order."""

    name, hidden_size, num_layers, vocab_size, logit_transform = "coder", 2, 2, 50, None

    def __init__(self):
        self.shapes = []

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        assert position_ids is None
        assert attention_mask is None
        self.shapes.append(tuple(tokens.shape))
        state, found = torch.zeros(len(tokens)), []
        for token in tokens.unbind(1):
            state = 0.5 * state + token + 1
            found.append(torch.stack([state, token.float()], dim=-1))
        whole = torch.stack(found, dim=1)
        return [whole, *(whole * (layer + 2) for layer in layers)]

    def head_weight(self, start, stop):
        return torch.zeros(stop - start, 2)


LENGTHS = [[3, 1, 28], [32], [5, 5, 5, 5, 5, 7], [30, 1, 1]]


def by_hand(teacher, tokens, lengths, layers=()):
    """Document by document."""
    found = []
    for sample, own in zip(tokens, lengths, strict=True):
        parts = [teacher.states(document[None], layers=layers) for document in sample.split(own)]
        found.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    return [torch.cat(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("prefix", [(), (7, 9)])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_states_are_those_of_each_document_alone(prefix, most):
    teacher = Recurrent()
    teacher = PrefixedTeacher(teacher, prefix) if prefix else teacher
    tokens = torch.randint(50, (len(LENGTHS), 32), generator=torch.Generator().manual_seed(1))
    found = document_forward(
        teacher, tokens, LENGTHS, group=None, layers=(1, 0), max_sequences=most
    )
    for ours, theirs in zip(found, by_hand(teacher, tokens, LENGTHS, (1, 0)), strict=True):
        assert torch.equal(ours, theirs)


def test_no_sample_no_pass():
    teacher = Recurrent()
    found = document_forward(
        teacher, torch.zeros(0, 8, dtype=torch.int64), [], group=None, layers=(1,)
    )
    assert [tuple(states.shape) for states in found] == [(0, 8, 2)] * 2
    assert not teacher.shapes


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_document_has_one_place_and_rows_waste_less_than_they_hold(ranks):
    generator = torch.Generator().manual_seed(ranks)
    lengths = []
    for _ in range(12):
        own = []
        while sum(own) < 512:
            length = int(torch.randint(1, 200, (), generator=generator))
            own.append(min(length, 512 - sum(own)))
        lengths.append(own)
    shares = plan_rows(lengths, ranks, 4 * 512)
    assert len(shares) == ranks
    passes = [rows for share in shares for rows in share]
    tokens = sorted(
        t for rows in passes for first, own in rows.documents for t in range(first, first + own)
    )
    assert tokens == list(range(12 * 512))
    for rows in passes:
        assert rows.length % 16 == 0
        assert rows.cost <= 4 * 512
        longest = max(own for _, own in rows.documents)
        assert rows.length - longest < 16
        assert all(2 * own >= longest for _, own in rows.documents)
    costs = [sum(rows.cost for rows in share) for share in shares]
    assert max(costs) <= 2 * sum(costs) / ranks
