"""The step hook with a schedule of our own: what stock code is given, and in which order."""

import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)

from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.step import SplitRegistry, StepHook

SPLITS = ("train", "valid", "test")


def batches(*ids):
    return [
        {"tokens": torch.full((2, 4), float(i)), "dataset_id": torch.tensor(row)}
        for i, row in enumerate(ids)
    ]


class Teacher:
    def __init__(self):
        self.begun = []

    def begin(self, batches, selected, length, *, bare):
        assert not bare
        self.begun.append(([b["tokens"] for b in batches], selected.tolist(), length))


class LossHook:
    """Records what the step hook tells the loss."""

    compares_prefix = False

    def __init__(self, teacher=None, domains=()):
        self.teachers = [] if teacher is None else [teacher]
        self._domains = list(domains)
        self.log = []

    def taught_by(self, teacher):
        return self._domains

    def wrap_forward_step(self, forward_step):
        return lambda *args: ("wrapped", forward_step(*args))

    def begin(self, labels, iteration):
        assert iteration == 7
        self.log.append(("begin", labels.tolist()))

    def end(self):
        self.log.append("end")


def schedule(**kwargs):
    """A forward-backward function: reads every micro-batch, returns what it saw."""
    iterators = kwargs["data_iterator"]
    several = iterators if isinstance(iterators, list) else [iterators]
    seen = [None if it is None else [next(it) for _ in range(2)] for it in several]
    return seen, kwargs["forward_step_func"](1)


def call(step, iterator):
    return step(
        forward_step_func=lambda x: x,
        data_iterator=iterator,
        num_microbatches=2,
        micro_batch_size=2,
        seq_length=4,
        forward_only=False,
    )


def hook(iterator, loss_hook, split="train", entries=(GENERAL, 0)):
    registry = SplitRegistry(dict.fromkeys(SPLITS, ()) | {split: [*entries]})
    registry.register(**dict.fromkeys(SPLITS) | {split: iterator})
    return StepHook(registry, HostGroup(None, 0), loss_hook, lambda: 7).wrap(schedule)


def test_the_schedule_gets_the_same_micro_batches_without_ids_and_ours_are_told_the_labels():
    iterator, teacher = iter(batches([0, 1], [1, 1], [0, 0])), Teacher()
    loss = LossHook(teacher, [0])
    (seen,), result = call(hook(iterator, loss), iterator)
    assert [int(b["tokens"][0, 0]) for b in seen] == [0, 1]
    assert all(set(b) == {"tokens"} for b in seen)
    assert result == ("wrapped", 1)
    assert loss.log == [("begin", [[GENERAL, 0], [0, 0]]), "end"]
    ((tokens, selected, length),) = teacher.begun
    assert all(own is b["tokens"] for own, b in zip(tokens, seen, strict=True)), "copied"
    assert (selected, length) == ([[False, True], [True, True]], 4)
    assert int(next(iterator)["tokens"][0, 0]) == 2


def test_virtual_pipeline_chunks_keep_their_places_and_ranks_without_data_stay_without():
    iterator = iter(batches([0, 1], [1, 1]))
    (first, last), _ = call(hook(iterator, LossHook()), [None, iterator])
    assert first is None
    assert len(last) == 2


@pytest.fixture
def recording():
    """Megatron's rerun state machine in the mode that keeps micro-batches for a replay."""
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
    yield
    destroy_rerun_state_machine()


def test_a_rerun_sees_the_same_labels_and_batches(recording):
    iterator = RerunDataIterator(iter(batches([0, 1], [1, 1], [0, 0])))
    iterator.advance()
    loss = LossHook()
    step = hook(iterator, loss)
    (first,), _ = call(step, iterator)
    iterator.rewind()
    (again,), _ = call(step, iterator)
    assert [b["tokens"].tolist() for b in first] == [b["tokens"].tolist() for b in again]
    assert loss.log[0] == loss.log[2]


def test_validation_uses_the_labels_of_its_own_blend():
    iterator, loss = iter(batches([0, 1], [1, 0])), LossHook()
    call(hook(iterator, loss, split="valid", entries=(0, GENERAL)), iterator)
    assert loss.log[0] == ("begin", [[0, GENERAL], [GENERAL, 0]])


def test_the_loss_is_told_of_the_end_when_the_schedule_fails():
    def failing(**kwargs):
        raise RuntimeError("out of memory")

    iterator, loss = iter(batches([0, 1], [1, 1])), LossHook()
    registry = SplitRegistry({"train": [GENERAL, 0], "valid": [], "test": []})
    registry.register(iterator, None, None)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(StepHook(registry, HostGroup(None, 0), loss, lambda: 7).wrap(failing), iterator)
    assert loss.log[-1] == "end"
