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
from megatron_moe_inject.losses import Sparse, Student, TermWeights, Vocabulary, reference
from megatron_moe_inject.losses.objective import injection_loss
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


def hook(iterator, *parts, split="train", entries=(GENERAL, 0), run=schedule, packed=False):
    registry = SplitRegistry(dict.fromkeys(SPLITS, ()) | {split: [*entries]})
    registry.register(**dict.fromkeys(SPLITS) | {split: iterator})
    return StepHook(registry, HostGroup(None, 0), lambda: 7, parts, packed=packed).wrap(run)


def test_the_schedule_gets_the_same_micro_batches_without_ids_and_parts_are_told_the_labels():
    iterator, part = iter(batches([0, 1], [1, 1], [0, 0])), Part()
    (seen,), result = call(hook(iterator, part), iterator)
    assert [int(b["tokens"][0, 0]) for b in seen] == [0, 1]
    assert all(set(b) == {"tokens"} for b in seen)
    assert result == ("wrapped", 1)
    assert part.log == [("begin", [[GENERAL, 0], [0, 0]]), "close", "end"]
    assert int(next(iterator)["tokens"][0, 0]) == 2


class Tokens(Part):
    """Looks at the tokens of a step as well."""

    reads_tokens = True

    def begin(self, step):
        super().begin(step)
        self.mask, self.starts = step.loss_mask, step.starts


@pytest.mark.parametrize("packed", [False, True])
def test_a_part_that_reads_tokens_is_told_which_count_and_where_documents_begin(packed):
    own = batches([0, 1], [1, 1])
    borders = [[[0, 4, 4], [0, 1, 4]], [[0, 2, 4], [0, 4, 4]]]
    masks = [[[1.0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]]
    for batch, mask, border in zip(own, masks, borders, strict=True):
        batch |= {"loss_mask": torch.tensor(mask), "cu_seqlens": torch.tensor(border).int()}
    part, iterator = Tokens(), iter(own)
    call(hook(iterator, part, packed=packed), iterator)
    assert torch.equal(part.mask, torch.tensor(masks) != 0)
    if packed:
        expected = [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 1, 0], [1, 0, 0, 0]]]
        assert part.starts.int().tolist() == expected
    else:
        assert part.starts is None


def test_where_all_tokens_count_there_is_no_mask():
    own = batches([0, 1], [1, 1])
    for batch in own:
        batch["loss_mask"] = torch.ones(2, 4)
    part, iterator = Tokens(), iter(own)
    call(hook(iterator, part), iterator)
    assert part.mask is None


def test_teachers_run_ahead_over_their_own_samples_without_a_copy():
    class Pass:
        begun, name = None, "coder"

        @property
        def passes(self):
            return (self,)

        ran_bare = False

        def begin(self, batches, selected, length, *, bare, starts):
            assert not bare
            assert starts is None
            self.begun = batches, selected.tolist(), length

    own, micro_batches = Pass(), [{"tokens": torch.zeros(2, 4)}, {"tokens": torch.ones(2, 4)}]
    labels = torch.tensor([[GENERAL, 0], [0, 0]])
    StepTeachers({0: own}, valid_vocab_size=8).begin(step_of(micro_batches, labels=labels))
    assert own.begun == (micro_batches, [[False, True], [True, True]], 4)


class Store:
    """A teacher that runs no model: k ids and log-probabilities of each token of the text."""

    name, unknown, ran_bare, tp_group, windowed = "stored", torch.tensor([6]), False, None, False

    def __init__(self, k):
        logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
        self.log_probs, self.ids = logits.log_softmax(-1).topk(k)

    @property
    def passes(self):
        return (self,)

    def together(self, targets):
        return targets[0]

    def begin(self, batches, selected, length, *, bare, starts):
        self.tokens = [b["tokens"][own] for b, own in zip(batches, selected, strict=True)]

    def says(self, tokens):
        return Sparse(self.ids[tokens], self.log_probs[tokens], "bucket")

    def target(self, micro_batch):
        return self.says(self.tokens[micro_batch])

    def readable(self, micro_batch):
        return (self.tokens[micro_batch] == 6).cumsum(1) == 0

    def of_step(self, wanted):
        tokens = torch.cat(self.tokens)
        return tokens, self.says(tokens)

    def readable_of_step(self, wanted):
        return None

    def next_tokens(self, tokens):
        return tokens.roll(-1, 1).index_fill(1, torch.tensor([3]), -1).flatten()


def test_a_teacher_that_hands_out_stored_ids_is_distilled_and_asked_how_sure_it_is():
    """As the model would be whose distribution over all ids was stored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (2, 3, 4), generator=generator)
    labels = torch.tensor([[GENERAL, 0, 1], [0, 1, 0]])
    teachers = StepTeachers({0: Store(7)}, valid_vocab_size=7)
    teachers.begin(step_of([{"tokens": part} for part in tokens], labels=labels))
    sure = teachers.confidences("top", labels)
    probs = torch.zeros(8, 7).scatter_(1, Store(7).ids, Store(7).log_probs.exp())
    expected = probs.amax(-1)[tokens].masked_fill((labels != 0)[..., None], 0)
    torch.testing.assert_close(sure, expected)

    weights = {GENERAL: TermWeights(0.0, 1.0), 0: TermWeights(0.7, 0.3), 1: TermWeights(0.0, 1.0)}
    hidden = torch.randn(4, 3, 5, generator=generator, requires_grad=True)
    head = torch.randn(8, 5, generator=generator)
    for micro_batch, domains in enumerate(labels.tolist()):
        targets = tokens[micro_batch].roll(-1, 1)
        groups = teachers.groups(micro_batch, domains, targets, weights, head)
        student = Student(hidden, head, targets.t(), Vocabulary(None, 7))
        terms = injection_loss(student, groups)
        taught = labels[micro_batch] == 0
        read = taught[:, None] & ((tokens[micro_batch] == 6).cumsum(1) == 0) & (targets != 6)
        logits = (hidden @ head.t()).transpose(0, 1)[..., :7]
        kd = reference.forward_kl(logits, probs[tokens[micro_batch]].log())
        ce = reference.cross_entropy(logits, targets)
        torch.testing.assert_close(terms.kd, kd.masked_fill(~read, 0).detach())
        expected = torch.where(taught[:, None], 0.7 * kd * read + 0.3 * ce, ce)
        torch.testing.assert_close(terms.total, expected)
        gradients = [torch.autograd.grad(x.sum(), hidden)[0] for x in (terms.total, expected)]
        torch.testing.assert_close(*gradients)


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
