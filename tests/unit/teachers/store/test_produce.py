"""What a teacher says about each document alone, whatever windows and passes it goes through."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers.base import Teacher, padded_rows
from megatron_moe_inject.teachers.store.manifest import StoredTeacher, StorePlan
from megatron_moe_inject.teachers.store.produce import Producer, passes, windows
from megatron_moe_inject.teachers.store.row_format import top_rows

VOCABULARY = 50
LENGTHS = [0, 1, 2, 9, 30, 64, 5, 17, 1, 3]


class Remembers(Teacher):
    """Its states are running means of what it has read in this row, and its passes are counted."""

    name, hidden_size, num_layers, vocab_size = "sums", 8, 1, VOCABULARY
    logit_transform = LogitTransform(scale=3.0)

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._embedding = torch.randn(VOCABULARY, 8, generator=generator)
        self._head = torch.randn(VOCABULARY, 8, generator=generator)
        self.shapes = []

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        self.shapes.append(tuple(tokens.shape))
        count = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return [self._embedding[tokens].cumsum(1) / count]

    def head_weight(self, start, stop):
        return padded_rows(self._head, VOCABULARY, start, stop)


def plan_of(**changes):
    fields = dict(
        teacher=StoredTeacher("hf:/m", "M", 1, {}, "fp32", []), tokenizer={},
        vocab_size=VOCABULARY, slots=VOCABULARY, mass=None, log_probs="fp32", temperatures=[1.0],
        context=64, overlap=0, shard_tokens=100, data=[],
    )  # fmt: skip
    return StorePlan(**(fields | changes))


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 12).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, c - 1))),
)
def test_every_token_but_the_last_is_asked_about_once_within_its_document(lengths, sizes):
    context, overlap = sizes
    found = list(windows(lengths, context, overlap))
    asked = [
        (row, token)
        for w in found
        for row, token in zip(itertools.count(w.row), range(w.first, w.end), strict=False)
    ]
    starts = np.cumsum([0, *lengths])
    expected = [
        t for a, n in zip(starts, lengths, strict=False) for t in range(a, a + max(0, n - 1))
    ]
    assert asked == list(enumerate(expected))
    for window in found:
        document = int(np.searchsorted(starts, window.begin, side="right")) - 1
        assert window.length <= context
        assert window.end < starts[document + 1]
        assert window.first == window.begin or window.first - window.begin == min(
            overlap, window.first - starts[document]
        )


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_passes_hold_each_window_once_and_little_that_fills_up(lengths, most):
    found = list(windows(lengths, 64, 0))
    own = list(passes(found, most))
    assert sorted(w for part in own for w in part) == sorted(found)
    for part in own:
        longest = max(w.length for w in part)
        assert longest * len(part) <= most or len(part) == 1
        assert all(2 * w.length >= longest for w in part)


def said_alone(tokens, context=64, overlap=0):
    """Log-probabilities of one document's tokens but the last, window by window."""
    teacher, rows = Remembers(), []
    for window in windows([len(tokens)], context, overlap):
        states = teacher.states(torch.from_numpy(tokens[window.begin : window.end])[None])[0][0]
        rows.append(
            (3.0 * states @ teacher.head_weight(0, VOCABULARY).t())[window.first - window.begin :]
        )
    return torch.cat(rows).log_softmax(-1) if rows else torch.zeros(0, VOCABULARY)


@pytest.mark.parametrize(("context", "overlap"), [(64, 0), (16, 0), (16, 5), (1, 0)])
@pytest.mark.parametrize("pass_tokens", [1, 64, 4096])
def test_documents_are_read_alone(context, overlap, pass_tokens):
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=sum(LENGTHS))
    plan = plan_of(context=context, overlap=overlap, slots=20, temperatures=[1.0, 2.0])
    teacher = Remembers()
    producer = Producer(teacher, plan, teacher.logit_transform, torch.device("cpu"), pass_tokens)
    content, counts = producer.rows(tokens, LENGTHS)
    rows = plan.row_format.decode(torch.from_numpy(content), torch.from_numpy(counts))
    documents = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    alone = torch.cat([said_alone(document, context, overlap) for document in documents])
    read = np.concatenate([document[:-1] for document in documents])
    following = torch.from_numpy(np.concatenate([document[1:] for document in documents]))
    expected = top_rows(
        torch.from_numpy(read), alone, slots=20, mass=None, temperatures=(1.0, 2.0),
        labels=following,
    )  # fmt: skip
    torch.testing.assert_close(rows.label, expected.label)
    assert torch.equal(rows.tokens, expected.tokens)
    assert torch.equal(rows.ids, expected.ids)
    torch.testing.assert_close(rows.log_probs, expected.log_probs)
    torch.testing.assert_close(rows.log_rest, expected.log_rest)
    # Rows are filled up to multiples of 16.
    assert all(r * (m - 15) <= max(pass_tokens, m) for r, m in teacher.shapes)


def test_ids_that_take_no_part_get_no_probability():
    teacher, gone = Remembers(), torch.tensor([3, 40])
    plan = plan_of(slots=VOCABULARY - 2)
    transform = LogitTransform(scale=3.0, excluded=gone)
    producer = Producer(teacher, plan, transform, torch.device("cpu"), 64)
    tokens = np.random.default_rng(1).integers(VOCABULARY, size=20)
    content, counts = producer.rows(tokens, [20])
    rows = plan.row_format.decode(torch.from_numpy(content), torch.from_numpy(counts))
    assert not torch.isin(rows.ids, gone).any()
    torch.testing.assert_close(rows.log_probs.exp().sum(-1), torch.ones(19))


def test_a_teacher_that_says_no_number_is_not_written():
    teacher = Remembers()
    teacher._head[7] = float("nan")
    producer = Producer(teacher, plan_of(), LogitTransform(), torch.device("cpu"), 64)
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        producer.rows(np.arange(5), [5])
