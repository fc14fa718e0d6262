"""A teacher with another tokenizer in a step, against brute force; the same tokenizer exactly."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.losses import Student, TermWeights, aligned_loss
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.align.samples import SampleReader
from megatron_moe_inject.teachers.align.scores import ModelScores
from megatron_moe_inject.teachers.align.step_teacher import AlignedTeacher
from megatron_moe_inject.teachers.base import Teacher
from tests.harness import gloo, own_tokenizers
from tests.harness.losses_cases import assert_close

S, N, B = 48, 3, 2
CPU = torch.device("cpu")


class Counting(Teacher):
    """Its state is a sum of all that it has read: causal, and without positions."""

    name, num_layers, logit_transform = "coder", 1, LogitTransform(3.0)

    def __init__(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.vocab_size, self.hidden_size = vocab, 8
        self._embedding = torch.randn(vocab, 8, generator=generator)
        self._head = torch.randn(vocab, 8, generator=generator)

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        read = self._embedding[tokens].cumsum(1)
        return [read / torch.arange(1, tokens.shape[1] + 1)[:, None].sqrt()]

    def head_weight(self, start, stop):
        return self._head[start:stop]

    def log_probs(self, ids):
        """Of the ids behind the first, one text read whole."""
        (states,) = self.states(torch.tensor(ids)[None, :-1])
        logits = 3.0 * states[0].double() @ self._head.double().t()
        return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@functools.cache
def tokenizers():
    folder = Path(tempfile.mkdtemp())
    return (
        read_tokenizer(own_tokenizers.byte_level(folder / "student", 300)),
        read_tokenizer(own_tokenizers.sentencepiece(folder / "teacher", 420)),
    )


def batches_of(student):
    """N micro-batches of B windows of a stream of documents."""
    stream = []
    for text in own_tokenizers.texts()[:6]:
        for start in range(0, 600, 130):
            (ids,) = student.encode([text[start : start + 130]])
            stream += [*ids, student.end]
    windows = torch.tensor(stream[: N * B * S + 1])
    tokens, labels = (x.view(N, B, S) for x in (windows[:-1], windows[1:]))
    mask = torch.ones(N, B, S)
    mask[0, 0, 10:13] = 0
    return [{"tokens": tokens[i], "labels": labels[i], "loss_mask": mask[i]} for i in range(N)]


def _step(same, apart):
    """TP 2 x CP 2: what each rank hands out, against the texts read whole."""
    rank = dist.get_rank()
    tp_group = gloo.block_group(2)
    cp_group = [dist.new_group([place, place + 2]) for place in (0, 1)][rank % 2]
    student, other = tokenizers()
    tokenizer = student if same else other
    model = Counting(len(tokenizer.pieces))
    reader = Reader(student, tokenizer, () if same else (tokenizer.begin,))
    teacher = AlignedTeacher(
        "coder", SampleReader(reader), ModelScores(model, dist.group.WORLD, CPU),
        tp_group=tp_group, host_group=tp_group, cp_group=cp_group, device=CPU,
    )  # fmt: skip
    batches = batches_of(student)
    selected = torch.tensor([[True, True], [False, True], [False, False]])
    tokens, labels, mask = (
        torch.stack([batch[name] for batch in batches])
        for name in ("tokens", "labels", "loss_mask")
    )
    starts = None
    if apart:
        starts = (tokens == student.end).roll(1, -1)
        starts[..., 0] = True
    teacher.begin(batches if tp_group.rank() == 0 else None, selected, S, starts=starts)

    reading = reader.read(
        tokens[selected].numpy(),
        labels[selected][:, -1].numpy(),
        (mask[selected] > 0).numpy(),
        None if starts is None else starts[selected].numpy(),
    )
    wanted, at = {}, 0
    for length in reading.lengths.tolist():
        row = slice(at, at + length)
        log_probs = model.log_probs([*reading.inputs[row].tolist(), int(reading.labels[row][-1])])
        for number, log_prob in zip(reading.numbers[row].tolist(), log_probs.tolist(), strict=True):
            wanted[number] = wanted.get(number, 0.0) + log_prob
        at += length
    wanted.pop(reading.places.size, None)
    assert len(wanted) > 20
    sample, told = 0, 0.0
    for micro_batch in range(N):
        target = teacher.target(micro_batch)
        rows = int(selected[micro_batch].sum())
        assert target.tokens == (rows, S // 2)
        places = torch.from_numpy(reading.places[sample : sample + rows]).long()
        own = context_parallel_slice(places[..., None], cp_group.rank(), 2)[..., 0]
        assert torch.equal(teacher.readable(micro_batch), own >= 0)
        for row, place in (own >= 0).nonzero().tolist():
            first = int(own[row, place])
            assert int(target.chunk[row, place]) == row * S + first
            expected = wanted[(sample + row) * S + first]
            assert float(target.log_probs[row, place]) == pytest.approx(expected, rel=1e-5)
            assert float(target.labels[row, place]) == int((places[row] == first).sum())
        assert (target.chunk[own < 0] == -1).all()
        told += float(target.per_label().sum())
        sample += rows
    total = torch.tensor(told)
    dist.all_reduce(total, group=cp_group)
    # The sums of the chunks are that of all tokens that are told of, each once.
    assert float(total) == pytest.approx(sum(wanted.values()), rel=1e-5)
    tokens_of_step, target = teacher.of_step(selected)
    assert torch.equal(target.covered, teacher.readable_of_step(selected))
    assert int((teacher.next_tokens(tokens_of_step) >= 0).sum()) == int(target.covered.sum())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_a_step(same, apart):
    gloo.pool(4).run(_step, same, apart)


def test_tokens_told_of_are_those_of_the_text():
    """Both sides' tokens of all chunks are the same bytes in the same order."""
    student, teacher = tokenizers()
    reader = Reader(student, teacher, (teacher.begin,))
    for batch in batches_of(student):
        labels, counted = batch["labels"].numpy(), batch["loss_mask"].numpy() > 0
        reading = reader.read(batch["tokens"].numpy(), labels[:, -1], counted)
        ours = student.bytes_of(labels[reading.places >= 0].tolist())
        told = reading.labels[reading.numbers < reading.places.size]
        assert ours.replace(b" ", b"") == teacher.bytes_of(told.tolist()).replace(b" ", b"")
        order = reading.numbers[reading.numbers < reading.places.size]
        assert (np.diff(order) >= 0).all()


def _exact():
    """With the student's tokenizer each label is a chunk, of the loss of its two outcomes."""
    student, _ = tokenizers()
    model = Counting(len(student.pieces))
    alone = gloo.block_group(1)
    teacher = AlignedTeacher(
        "coder", SampleReader(Reader(student, student)), ModelScores(model, None, CPU),
        tp_group=alone, host_group=None, cp_group=alone, device=CPU,
    )  # fmt: skip
    batches = batches_of(student)
    teacher.begin(batches, torch.ones(N, B, dtype=torch.bool), S)
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(len(student.pieces), 8, generator=generator, dtype=torch.float64)
    covered = 0
    for i, batch in enumerate(batches):
        hidden = torch.randn(B * S, 8, generator=generator, dtype=torch.float64).requires_grad_()
        labels = batch["labels"].flatten()
        target = teacher.target(i).changed(lambda x: x.flatten(0, 1))
        loss = aligned_loss(Student(hidden, head, labels), target, TermWeights(1.0, 0.0))
        loss.total.sum().backward()
        again = hidden.detach().clone().requires_grad_()
        log_q = (again @ head.t()).log_softmax(-1)[torch.arange(B * S), labels]
        pairs = zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True)
        log_p = torch.cat([model.log_probs([*tokens, own[-1]]) for tokens, own in pairs])
        p, q = log_p.exp(), log_q.exp()
        exact = p * (log_p - log_q) + (1 - p) * ((1 - p) / (1 - q)).log()
        exact = torch.where(target.covered, exact, 0.0)
        exact.sum().backward()
        assert_close(loss.kd, exact, "kd", 1e-5)
        assert_close(hidden.grad, again.grad, "hidden gradient", 1e-5)
        assert (target.labels[target.covered] == 1).all()
        covered += int(target.covered.sum())
    assert covered > 0.85 * N * B * S


def test_the_same_tokenizer_is_exact():
    gloo.pool(4).run(_exact)
