"""Works: stages and places together run everything once, in passes that no ratio changes.

A teacher whose states show what it was given runs every share; what the ranks of the other places
would send is put in by hand.
"""

import contextlib
import random

import pytest
import torch

from megatron_moe_inject.teachers import Teacher
from megatron_moe_inject.teachers.documents import DocumentWork, document_values
from megatron_moe_inject.teachers.forward import SampleWork
from megatron_moe_inject.teachers.spread import UNKNOWN, Loads

LENGTH = 8
RATIOS = (UNKNOWN, 0.01, 0.7, 40.0)


class Echo(Teacher):
    """State of a token: the token, its position, what it may see, and the rows of its pass."""

    name, hidden_size = "echo", 4

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        count, length = tokens.shape
        places = torch.arange(length).expand(count, length)
        positions = places if position_ids is None else position_ids
        seen = places if attention_mask is None else (~attention_mask).sum(-1)[:, 0]
        last = torch.stack([tokens, positions, seen, torch.full_like(tokens, count)], -1).double()
        return [last, *(last + 1000 * (layer + 1) for layer in layers)]

    def head_weight(self, start, stop):
        return torch.zeros(stop - start, 4, dtype=torch.float64)


class Counted(Echo):
    """Keeps how many passes it was told of before they ran, and whether they did."""

    def __init__(self):
        self.told, self.ran = [], []

    @contextlib.contextmanager
    def passes(self, own):
        self.told.append(own)
        self.ran.append(0)
        yield

    def states(self, *args, **kwargs):
        self.ran[-1] += 1
        return super().states(*args, **kwargs)


class Group:
    """Of the other places' ranks: their padded states are what this one gathers."""

    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def everything(make, places, stages, inputs, ratio, monkeypatch, layers=(2,)):
    """States of all layers as the last stage of each place has them, and by place and stage how
    much was run."""
    own, run, shares = [], [], []
    for place in range(places):
        loads = Loads(stages)
        work = make((place, places), loads, ratio)
        parts = []
        for stage in range(stages):
            given = work.inputs(stage, inputs)
            assert [tuple(x.shape) for x in given] == work.shapes(stage, len(inputs))
            states = [torch.zeros(*work.tokens(stage), 4, dtype=torch.float64)] * 2
            if work.sequences(stage):
                states = work.run(stage, Echo(), given, layers)
                assert states[0].shape == (*work.tokens(stage), 4)
            parts.append(states)
        own.append([torch.cat(of_layer) for of_layer in zip(*parts, strict=True)])
        run.append([work.sequences(stage) for stage in range(stages)])
        shares.append(work)
    found = []
    for place in range(places):
        together = []
        for layer in range(2):

            def gather(output, mine, group, layer=layer):
                rows = []
                for states in own:
                    padded = torch.zeros_like(mine)
                    padded[: len(states[layer])] = states[layer]
                    rows.append(padded)
                output.copy_(torch.cat(rows))

            monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gather)
            group = Group(places) if places > 1 else None
            together.append(shares[place].together(own[place][layer], group))
        found.append(together)
    return found, run


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 13])
def test_samples(monkeypatch, places, stages, count):
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(100, (count, LENGTH), generator=generator)
    positions = torch.randint(50, (count, LENGTH), generator=generator)
    mask = torch.rand(count, 1, LENGTH, LENGTH, generator=generator) > 0.5
    expected = Echo().states(tokens, positions, mask)[0][..., :3]
    seen = []
    for ratio in RATIOS:
        found, run = everything(
            lambda place, loads, ratio: SampleWork(count, LENGTH, place, loads, ratio),
            *(places, stages, [tokens, positions, mask], ratio, monkeypatch),
        )
        assert sum(map(sum, run)) == count
        for states, deeper in found:
            assert torch.equal(states[..., :3], expected)
            assert torch.equal(deeper, states + 3000)
        seen.append(found[0][0])
    assert all(torch.equal(states, seen[0]) for states in seen)


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 11])
def test_documents(monkeypatch, places, stages, count):
    length = 64
    draw = random.Random(count)
    lengths = []
    for _ in range(count):
        cuts = sorted(draw.sample(range(1, length), draw.randint(0, 5)))
        lengths.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(100, (count, length), generator=generator)
    places_in_documents = [torch.cat([torch.arange(own) for own in sample]) for sample in lengths]
    seen = []
    for ratio in RATIOS:
        found, run = everything(
            lambda place, loads, ratio: DocumentWork(lengths, length, place, loads, ratio),
            *(places, stages, [tokens], ratio, monkeypatch),
        )
        assert sum(map(sum, run)) >= count
        for states, deeper in found:
            assert states.shape == (count, length, 4)
            assert torch.equal(states[..., 0].long(), tokens)
            if count:
                assert torch.equal(states[..., 1].long(), torch.stack(places_in_documents))
            assert torch.equal(deeper, states + 3000)
        seen.append(found[0][0])
    assert all(torch.equal(states, seen[0]) for states in seen)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_ranks_that_hold_its_experts_together_hear_of_every_share(count):
    """Also of one without a pass, as others' shares may have some."""
    tokens, lengths = torch.zeros(count, 64, dtype=torch.int64), [[20, 44]] * count
    for work in (
        SampleWork(count, 64, (0, 1), Loads(3), UNKNOWN),
        DocumentWork(lengths, 64, (0, 1), Loads(3), UNKNOWN),
    ):
        teacher = Counted()
        for stage in range(3):
            work.run(stage, teacher, work.inputs(stage, [tokens]), ())
        assert len(teacher.told) == 3
        assert teacher.told == teacher.ran
        assert (sum(teacher.told) > 0) == (count > 0)
    teacher, flat = Counted(), [length for sample in lengths for length in sample]
    found = document_values(
        teacher, tokens.flatten(), flat, lambda states, places: states[:, 0].float(),
        group=None, max_tokens=64,
    )  # fmt: skip
    assert found.shape == (64 * count,)
    assert len(teacher.told) == 1
    assert teacher.told == teacher.ran


def test_documents_of_two_teachers_are_planned_alike_at_every_place():
    """Though each place runs others: what one teacher takes counts for the next one everywhere."""
    lengths, plans = [[5, 59], [64], [7, 7, 50], [30, 34], [64]], []
    for place in range(2):
        loads = Loads(3)
        first = DocumentWork(lengths, 64, (place, 2), loads, 0.4)
        second = DocumentWork(lengths, 64, (place, 2), loads, 3.0)
        plans.append((first._by_place, second._by_place))
    assert plans[0] == plans[1]


def test_later_stages_take_more_documents():
    loads = Loads(4)
    work = DocumentWork([[64]] * 40, 64, (0, 1), loads, 3.0)
    run = [work.sequences(stage) for stage in range(4)]
    assert run == sorted(run)
    assert run[-1] > run[0]
    work = DocumentWork([[64]] * 2, 64, (0, 1), Loads(4), 0.1)
    assert [work.sequences(stage) for stage in range(4)] == [0, 0, 0, 2]
