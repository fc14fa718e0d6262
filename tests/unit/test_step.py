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
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.step import StepHook
from megatron_moe_inject.teachers.step_teachers import StepTeachers
from tests.harness.steps import step_of

SPLITS = ("train", "valid", "test")


def batches(*ids):
    return [
        {"tokens": torch.full((2, 4), float(i)), "dataset_id": torch.tensor(row)}
        for i, row in enumerate(ids)
    ]


class Part(StepPart):
    """Records what it is told, and wraps the script's forward step."""

    def __init__(self):
        self.log = []

    def begin(self, step):
        assert step.iteration == 7
        assert step.training
        self.log.append(("begin", step.labels.tolist()))
        forward_step = step.forward_step
        step.forward_step = lambda *args: ("wrapped", forward_step(*args))
        step.arguments |= {"added": True}

    def failed(self, error):
        self.log.append(str(error))

    def close(self):
        self.log.append("close")

    def end(self, step, reports):
        self.log.append("end")


def schedule(*, data_iterator, forward_step_func, added, **_):
    """A forward-backward function: reads every micro-batch, returns what it saw."""
    assert added
    several = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    seen = [None if it is None else [next(it) for _ in range(2)] for it in several]
    return seen, forward_step_func(1)


def call(step, iterator):
    return step(
        forward_step_func=lambda x: x,
        data_iterator=iterator,
        num_microbatches=2,
        micro_batch_size=2,
        seq_length=4,
        forward_only=False,
    )


def hook(iterator, *parts, split="train", entries=(GENERAL, 0), run=schedule):
    registry = SplitRegistry(dict.fromkeys(SPLITS, ()) | {split: [*entries]})
    registry.register(**dict.fromkeys(SPLITS) | {split: iterator})
    return StepHook(registry, HostGroup(None, 0), lambda: 7, parts).wrap(run)


def test_the_schedule_gets_the_same_micro_batches_without_ids_and_parts_are_told_the_labels():
    iterator, part = iter(batches([0, 1], [1, 1], [0, 0])), Part()
    (seen,), result = call(hook(iterator, part), iterator)
    assert [int(b["tokens"][0, 0]) for b in seen] == [0, 1]
    assert all(set(b) == {"tokens"} for b in seen)
    assert result == ("wrapped", 1)
    assert part.log == [("begin", [[GENERAL, 0], [0, 0]]), "close", "end"]
    assert int(next(iterator)["tokens"][0, 0]) == 2


def test_teachers_run_ahead_over_their_own_samples_without_a_copy():
    class Pass:
        begun = None
        teacher = None

        @property
        def passes(self):
            return (self,)

        ran_bare = False

        def begin(self, batches, selected, length, *, bare):
            assert not bare
            self.begun = batches, selected.tolist(), length

    Pass.teacher = type("Named", (), {"name": "coder"})
    own, micro_batches = Pass(), [{"tokens": torch.zeros(2, 4)}, {"tokens": torch.ones(2, 4)}]
    labels = torch.tensor([[GENERAL, 0], [0, 0]])
    StepTeachers({0: own}, valid_vocab_size=8).begin(step_of(micro_batches, labels=labels))
    assert own.begun == (micro_batches, [[False, True], [True, True]], 4)


def test_virtual_pipeline_chunks_keep_their_places_and_ranks_without_data_stay_without():
    iterator = iter(batches([0, 1], [1, 1]))
    (first, last), _ = call(hook(iterator, Part()), [None, iterator])
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
    part = Part()
    step = hook(iterator, part)
    (first,), _ = call(step, iterator)
    iterator.rewind()
    (again,), _ = call(step, iterator)
    assert [b["tokens"].tolist() for b in first] == [b["tokens"].tolist() for b in again]
    assert part.log[0] == part.log[3]


def test_validation_uses_the_labels_of_its_own_blend():
    iterator, part = iter(batches([0, 1], [1, 0])), Part()
    call(hook(iterator, part, split="valid", entries=(0, GENERAL)), iterator)
    assert part.log[0] == ("begin", [[0, GENERAL], [GENERAL, 0]])


def test_parts_begin_and_end_in_their_order():
    log = []

    class Named(StepPart):
        def __init__(self, name):
            self.name = name

        def begin(self, step):
            step.arguments |= {"added": True}
            log.append(f"begin {self.name}")

        def end(self, step, reports):
            log.append(f"end {self.name}")

    iterator = iter(batches([0, 1], [1, 1]))
    call(hook(iterator, Named("a"), Named("b")), iterator)
    assert log == ["begin a", "begin b", "end a", "end b"]


def test_parts_are_told_of_an_error_and_closed_when_the_schedule_fails():
    def failing(**kwargs):
        raise RuntimeError("out of memory")

    iterator, part = iter(batches([0, 1], [1, 1])), Part()
    with pytest.raises(RuntimeError, match="out of memory"):
        call(hook(iterator, part, run=failing), iterator)
    assert part.log[1:] == ["out of memory", "close"]
