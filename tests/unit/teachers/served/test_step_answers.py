"""When a step asks, and what its ranks do where servers fail."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.leave import CannotGoOn, LeaveTraining
from megatron_moe_inject.host.step import Step
from megatron_moe_inject.teachers.served.answers import Counts, ServerFailure
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.served.step_answers import Asked, StepAnswers
from megatron_moe_inject.teachers.served.step_teacher import AnswersOfStep

LENGTH, SLOTS = 4, 3


class World:
    """One rank, which another may be worse off than."""

    def __init__(self):
        self.others = [0.0, 0.0, 0.0, -np.inf]

    def largest(self, values):
        return [max(pair) for pair in zip(values, self.others, strict=True)]

    def said_by(self, rank, text):
        return text or f"rank {rank} says why"


class FakeAnswers:
    """Says of each text that its own ids are certain."""

    def __init__(self):
        self.counts, self.ready, self.log, self.fails = Counts(), 5, [], False

    def hint(self, texts):
        self.log += [("hint", int(text[0])) for text in texts]

    def forget(self, texts):
        self.log += [("forget", int(text[0])) for text in texts]

    def fetch(self, texts):
        self.log += [("fetch", int(text[0])) for text in texts]
        if self.fails:
            raise ServerFailure("http://a says HTTP 500")
        self.counts.waited, self.counts.missed = 0.25, 1
        told = []
        for text in texts:
            ids = np.full((len(text) - 1, SLOTS), -1, np.int32)
            ids[:, 0] = text[1:]
            told.append(Answer(ids, np.where(ids < 0, -np.inf, 0.0).astype(np.float32)))
        return told


class Loader:
    """Samples 0, 1, 2, ... in micro-batches of one; even ones are the domain's."""

    def __init__(self, count=20):
        self.batch_sampler = [[n] for n in range(count)]
        self.dataset = [sample(n) for n in range(count)]


def sample(number):
    tokens = torch.arange(number, number + LENGTH)
    return {"tokens": tokens, "labels": tokens + 1, "dataset_id": number % 2}


def step_of(*numbers, training=True):
    batches = [{k: torch.as_tensor(v)[None] for k, v in sample(n).items()} for n in numbers]
    labels = torch.tensor([[n % 2 - 1] for n in numbers])  # of even ones GENERAL, of odd ones 0
    return Step(labels, [batches], 0, LENGTH, training, None, None, as_read=batches)


@pytest.fixture
def asking(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)

    def made(ahead):
        answers, world, told = FakeAnswers(), World(), AnswersOfStep()
        asked = Asked(answers, [0], SLOTS, ahead, lambda p, r: fail("teachers.c.source", "s", p, r))
        part = StepAnswers(
            {"coder": asked}, world, told, entries=[-1, 0], vocab_size=100, is_packed=False,
            device=torch.device("cpu"),
        )  # fmt: skip
        part.coming.follow(Loader(), cyclic=False)
        return part, answers, world, told

    return made


def test_steps_are_asked_for_ahead(asking):
    """Two micro-batches a step, of which one is the domain's; so many whole steps before."""
    part, answers, _, told = asking(2)
    part.begin(step_of(0, 1))
    assert answers.log == [("hint", 1), ("hint", 3), ("hint", 5), ("fetch", 1)]
    ids, log_probs = told.by_teacher["coder"][:2]
    assert ids[0, :, 0].tolist() == [2, 3, 4, 5]
    assert (log_probs[0, :, 0] == 0).all()
    reports = [{}]
    part.end(step_of(0, 1), reports)
    assert answers.log[4:] == [("hint", 7)]
    (terms,) = reports[0].values()
    assert {name: pair.tolist() for name, pair in terms.items()} == {
        "server wait": [0.25, 1.0], "server misses": [1.0, 1.0], "server ahead": [5.0, 1.0],
    }  # fmt: skip
    part.begin(step_of(18, 19, training=False))
    part.end(step_of(18, 19, training=False), [{}])
    assert answers.log[5:] == [("fetch", 19)]
    part.begin(step_of(2, 3))
    assert answers.log[6:] == [("fetch", 3)]


def test_nothing_is_asked_for_ahead_of_its_step(asking):
    part, answers, _, _ = asking(0)
    part.begin(step_of(0, 1))
    part.end(step_of(0, 1), [{}])
    assert answers.log == [("hint", 1), ("fetch", 1)]


def test_all_ranks_leave_together(asking):
    part, answers, world, _ = asking(0)
    answers.fails = True
    with pytest.raises(CannotGoOn, match="no longer says what is needed: http://a says HTTP 500"):
        part.begin(step_of(0, 1))
    answers.fails, world.others = False, [4.0 - 1, 0.0, 0.0, -np.inf]
    with pytest.raises(CannotGoOn, match="rank 1 says why"):
        part.begin(step_of(0, 1))


def test_training_is_left_with_a_checkpoint():
    """As Megatron's own ``train_step`` leaves; an evaluation is given up, and the next step too."""
    saves = []
    leave = LeaveTraining(lambda: saves.append(1) or True)
    step, evaluate = (leave.around[n] for n in ("train_step", "evaluate_and_print_results"))

    def cannot(*args, **kwargs):
        raise CannotGoOn("no teacher")

    assert step(lambda value: value, 5) == 5
    assert evaluate(cannot) is None
    assert str(leave.reason) == "no teacher"
    assert evaluate(lambda: pytest.fail("nothing more is measured")) is None
    told = step(lambda: pytest.fail("nor trained"))
    assert told == ({}, True, True, True, 2, None, None, 0)
    assert saves == [1]
