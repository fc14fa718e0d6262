"""A blend whose shares change: each entry's samples once and in order, whatever the batches."""

import pickle
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import mpu, num_microbatches_calculator
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_moe_inject.data.scheduled_blend import BlendSchedule, SampleOrder, ScheduledBlend
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError

LABELS = (0, -1, 0, 1, -1)
WEIGHTS = (0.2, 0.1, 0.1, 0.3, 0.3)


def falling(length):
    general = np.linspace(0.8, 0.0, length)
    return {0: (1 - general) * 0.75, -1: general, 1: (1 - general) * 0.25}


def order_of(sizes):
    return SampleOrder(sizes, LABELS, falling(len(sizes)), WEIGHTS)


class Told:
    """A dataset whose samples say where they are from."""

    def __init__(self, entry):
        self.entry = entry

    def __getitem__(self, i):
        return {"at": (self.entry, int(i))}


BLEND = SimpleNamespace(split="train", datasets=[Told(entry) for entry in range(len(LABELS))])


sizes = st.lists(st.integers(1, 7).map(lambda n: 4 * n), min_size=1, max_size=12)


@given(sizes, st.sampled_from([(1, 1), (2, 2), (1, 4)]))
def test_each_entry_is_read_once_and_in_order_over_the_iterations(sizes, dealing):
    order = order_of(sizes)
    blend = ScheduledBlend(BLEND, order, *dealing)
    assert len(blend) == sum(sizes)
    read = [blend[i] for i in range(len(blend))]
    begin, seen = 0, [0] * len(LABELS)
    for size, counts in zip(sizes, order.counts, strict=True):
        own = read[begin : begin + size]
        for entry, count in enumerate(counts):
            found = sorted(at for e, at in (sample["at"] for sample in own) if e == entry)
            assert found == list(range(seen[entry], seen[entry] + count))
            seen[entry] += count
        begin += size
    assert seen == order.samples.tolist()
    assert all(sample["dataset_id"] == sample["at"][0] for sample in read)


@given(sizes)
def test_classes_follow_their_shares_and_entries_their_weights(sizes):
    order = order_of(sizes)
    shares = falling(len(sizes))
    for label, share in shares.items():
        entries = [entry for entry, own in enumerate(LABELS) if own == label]
        due = np.cumsum(share * sizes)
        taken = np.cumsum(order.counts[:, entries].sum(axis=1))
        assert np.abs(taken - due).max() < 1 + 1e-6
        total = sum(WEIGHTS[entry] for entry in entries)
        for entry in entries:
            own = np.cumsum(order.counts[:, entry])
            assert np.abs(own - taken * WEIGHTS[entry] / total).max() <= 0.5 + 1e-6


def test_any_position_gives_the_same_whenever_it_is_asked_for():
    order = order_of([8, 4, 12])
    blend = ScheduledBlend(BLEND, order, 2, 2)
    forwards = [blend[i]["at"] for i in range(24)]
    assert len(set(forwards)) == 24
    again = pickle.loads(pickle.dumps(blend))
    assert [again[np.int64(i)]["at"] for i in reversed(range(24))] == forwards[::-1]
    assert type(blend[0]["dataset_id"]) is np.int16
    assert blend.split == "train"
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            blend[outside]


def test_another_number_of_ranks_gets_the_same_batches():
    order = order_of([8, 16, 24])
    one, four = (ScheduledBlend(BLEND, order, 2, lanes) for lanes in (1, 4))
    for begin, end in ((0, 8), (8, 24), (24, 48)):
        batches = [[blend[i]["at"] for i in range(begin, end)] for blend in (one, four)]
        assert sorted(batches[0]) == sorted(batches[1])
    assert [one[i]["at"] for i in range(48)] != [four[i]["at"] for i in range(48)]


def test_a_longer_run_begins_like_a_shorter_one():
    """What a position gives depends on the shares up to there, not on the length of the run."""
    shares = falling(20)
    long = SampleOrder([6] * 20, LABELS, shares, WEIGHTS)
    short = SampleOrder([6] * 9, LABELS, {c: s[:9] for c, s in shares.items()}, WEIGHTS)
    assert (long.counts[:9] == short.counts).all()
    for iteration in range(9):
        for a, b in zip(long.batch(iteration), short.batch(iteration), strict=True):
            assert a.tolist() == b.tolist()


@pytest.fixture
def built(monkeypatch):
    """What ``BlendSchedule`` makes of a blend whose entries have so many samples."""
    monkeypatch.setattr(mpu, "get_data_parallel_world_size", lambda: 1)

    def build(lengths, iteration=0, consumed=0, kind=BlendedDataset):
        train = object.__new__(kind)
        train.split, train.datasets = "train", [range(n) for n in lengths]
        args = Namespace(micro_batch_size=1, iteration=iteration, consumed_train_samples=consumed)
        schedule = BlendSchedule(order_of([10] * 4), [f"e{i}" for i in range(5)], args)
        found = schedule.datasets([train, "valid", "test"])
        assert found[1:] == ("valid", "test")
        if schedule._problem is not None:
            assert found[0] is None
            raise schedule._problem
        assert isinstance(found[0], ScheduledBlend)
        assert schedule.datasets([None, None, None]) == (None, None, None)

    return build


ASKED = (12, 4, 6, 6, 12)


def test_enough_samples_are_enough(built):
    assert tuple(order_of([10] * 4).samples) == ASKED
    built(ASKED)
    built(ASKED, iteration=3, consumed=30)
    built(ASKED, iteration=5, consumed=50)  # a checkpoint of beyond this run's end


class Unlike:
    """A dataset of the script's own."""


@pytest.mark.parametrize(
    ("lengths", "more", "message"),
    [
        ((12, 4, 6, 5, 12), {}, "takes 6 samples of e3, but Megatron built 5; write the weights"),
        ((12, 4, 6, 5, 12), {}, "0.3 e0 0.1 e1 0.15 e2 0.15 e3 0.3 e4"),
        (ASKED[:4], {}, "not on Megatron's blend of 5 entries"),
        (ASKED, {"kind": Unlike}, "trains on a Unlike, not on Megatron's blend"),
        (ASKED, {"iteration": 3, "consumed": 24}, "3 iterations took 24 samples, but by today's"),
    ],
)
def test_data_that_cannot_be_mixed(built, lengths, more, message):
    with pytest.raises(RecipeError) as error:
        built(lengths, **more)
    assert message in str(error.value)


@pytest.fixture
def calculator():
    """Megatron's own, made with the options that a test gives, and gone afterwards."""

    def make(**options):
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=1, micro_batch_size=2, data_parallel_size=2, seq_length=32, **options
        )

    yield make
    num_microbatches_calculator.unset_num_microbatches_calculator()


def arguments(**options):
    names = ("train_iters", "train_samples", "step_batch_size_schedule", "global_batch_size")
    return Namespace(**{**dict.fromkeys(names), **options})


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"train_iters": 3}, [8, 8, 8]),
        ({"train_samples": 24}, [8, 8, 8]),
        ({"train_samples": 31}, [8, 8, 8]),
        ({}, []),
    ],
)
def test_iterations_of_one_batch_size(calculator, options, sizes):
    calculator(global_batch_size=8)
    assert compat.batch_sizes(arguments(global_batch_size=8, **options)) == sizes


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"train_iters": 6}, [4, 4, 4, 4, 8, 8]),
        ({"train_samples": 28}, [4, 4, 4, 4, 8, 8]),
        ({"train_samples": 17}, [4, 4, 4, 4, 8]),
    ],
)
def test_iterations_of_a_batch_size_that_grows(calculator, options, sizes):
    steps = {"step_batch_size_schedule": "0:4 512:8"}  # in tokens
    calculator(**steps)
    assert compat.batch_sizes(arguments(global_batch_size=4, **steps, **options)) == sizes
    assert num_microbatches_calculator.get_current_global_batch_size() == 4
