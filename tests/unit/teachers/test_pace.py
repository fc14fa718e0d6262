"""What the first steps measure, and when ranks agree on it."""

import pytest
import torch

from megatron_moe_inject.teachers.pace import Pace
from megatron_moe_inject.teachers.spread import UNKNOWN


class Clock:
    """A time that goes on when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Stage(torch.nn.Module):
    """A chunk whose forward takes two seconds."""

    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def forward(self, states):
        self._clock.now += 2.0
        return states


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("megatron_moe_inject.teachers.pace.time.perf_counter", clock)
    return clock


@pytest.fixture
def agreements(monkeypatch):
    """By call, what was summed over two ranks, of which the other measured as much again."""
    calls = []

    def all_reduce(sums):
        calls.append(sums.tolist())
        sums.mul_(2)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    return calls


def step(pace, stage, clock, teachers=(), training=True):
    pace.begin(training)
    for name, sequences, seconds in teachers:
        with pace.running(name, sequences):
            clock.now += seconds
    for _ in range(3):
        stage(torch.zeros(1))
    with torch.no_grad():  # the original model's pass is none of a stage's forwards
        clock.now += 50
        stage(torch.zeros(1))


def test_the_second_step_counts_and_the_third_knows(clock, agreements):
    stage = Stage(clock)
    pace = Pace([stage], ["coder"], torch.device("cpu"))
    step(pace, stage, clock, [("coder", 1, 99.0)])
    step(pace, stage, clock, [("coder", 1, 77.0)], training=False)
    step(pace, stage, clock, [("coder", 4, 12.0)])
    assert (pace.ratio("coder"), agreements) == (UNKNOWN, [])
    step(pace, stage, clock, [("coder", 1, 88.0)])
    assert pace.ratio("coder") == 1.5
    assert agreements == [[[2.0, 1.0], [3.0, 1.0]]]
    assert not stage._forward_hooks
    assert not stage._forward_pre_hooks
    for _ in range(20):
        step(pace, stage, clock, [("coder", 1, 44.0)])
    assert (pace.ratio("coder"), len(agreements)) == (1.5, 1)


def test_a_teacher_without_text_is_asked_for_ever_more_seldom(clock, agreements):
    stage = Stage(clock)
    pace = Pace([stage], ["often", "seldom"], torch.device("cpu"))
    asked = []
    for number in range(1, 21):
        seldom = [("seldom", 2, 2.0)] if number == 12 else []
        before = len(agreements)
        step(pace, stage, clock, [("often", 1, 1.0), *seldom])
        if len(agreements) > before:
            asked.append(number)
    assert asked == [3, 5, 9, 17]
    assert (pace.ratio("often"), pace.ratio("seldom")) == (0.5, 0.5)
    assert [len(sums) for sums in agreements] == [3, 2, 2, 2]


def test_a_rank_for_which_nobody_waits_learns_it_from_the_others(clock, agreements, monkeypatch):
    def all_reduce(sums):
        assert sums.tolist()[0] == [0.0, 0.0]
        sums[0] = torch.tensor([4.0, 1.0])

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    stage = Stage(clock)
    pace = Pace([], ["coder"], torch.device("cpu"))
    for _ in range(3):
        step(pace, stage, clock, [("coder", 1, 1.0)])
    assert pace.ratio("coder") == 0.25
