"""Which texts a step asks about, ahead of it too, and what becomes of answers."""

import math

import numpy as np
import pytest
import torch

from megatron_moe_inject.teachers.served.ahead import Ahead
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.served.step_teacher import at_temperature, of_student
from megatron_moe_inject.teachers.served.texts import texts_of


def test_samples_with_their_last_label():
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    labels = np.array([[2, 3, 4, 9], [6, 7, 8, -100]])
    first, second = texts_of(tokens, labels)
    assert first.tokens.tolist() == [1, 2, 3, 4, 9]
    assert (first.sample, first.rows) == (0, slice(0, 4))
    assert second.tokens.tolist() == [5, 6, 7, 8]
    assert (second.sample, second.rows) == (1, slice(0, 3))


def test_documents_of_packed_samples():
    """Each with the label at its end, so that each position has a row; one of one token too."""
    tokens, labels = np.array([[1, 2, 3, 4, 5]]), np.array([[2, 3, 4, 5, -100]])
    found = texts_of(tokens, labels, [[2, 1, 1, 1]])
    assert [text.tokens.tolist() for text in found] == [[1, 2, 3], [3, 4], [4, 5]]
    assert [text.rows for text in found] == [slice(0, 2), slice(2, 3), slice(3, 4)]


def test_what_has_no_label_at_the_end_is_not_asked_about():
    tokens, labels = np.array([[5, 6, 7, 8], [1, 2, 3, 4]]), np.array([[-1, 7, -1, -1], [-1] * 4])
    (text,) = texts_of(tokens, labels)
    assert text.tokens.tolist() == [5, 6, 7]
    assert (text.sample, text.rows) == (0, slice(0, 2))


def test_ids_that_the_student_lacks_take_no_part():
    answer = Answer(
        np.array([[9, 2, 5], [1, 0, -1], [8, 9, -1]], np.int32),
        np.log(np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 0.0], [0.5, 0.5, 0.0]]) + 1e-300).astype(
            np.float32
        ),
    )
    found = of_student(answer, 8)
    assert found.ids.tolist() == [[2, 5, -1], [1, 0, -1], [-1, -1, -1]]
    assert np.exp(found.log_probs[0]) == pytest.approx([0.5, 0.25, 0.0])
    assert np.exp(found.log_probs[1, :2]) == pytest.approx([0.5, 0.25])
    assert (found.log_probs[2] == -math.inf).all()
    assert of_student(answer, 10) is answer


def test_another_temperature_of_all_ids():
    logits = torch.randn(3, 7)
    found = at_temperature(logits.log_softmax(-1), 2.5)
    torch.testing.assert_close(found, (logits / 2.5).log_softmax(-1))
    unused = torch.full((1, 7), -math.inf)
    assert torch.equal(at_temperature(unused, 2.0), unused)


class Sampler:
    """As Megatron's random one, which counts what it gave."""

    def __init__(self, order):
        self.order, self.consumed = order, 0

    def __iter__(self):
        for batch in self.order:
            self.consumed += len(batch)
            yield batch


class Loader:
    def __init__(self, order):
        self.batch_sampler = Sampler(order)
        self.dataset = [{"tokens": torch.tensor([n, n]), "loss_mask": None} for n in range(100)]


@pytest.fixture
def foreseen():
    log = []
    ahead = Ahead(
        lambda batch: {"coder": batch["tokens"][:, 0].tolist()},
        lambda texts: log.append(("hint", texts["coder"])),
        lambda texts: log.append(("forget", texts["coder"])),
    )
    return ahead, log


def batch(*numbers):
    return {"tokens": torch.tensor([[n, n] for n in numbers])}


def test_what_comes_is_foreseen(foreseen):
    ahead, log = foreseen
    loader = Loader([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert ahead.follow(loader, cyclic=False)
    ahead.reach(2)
    assert log == [("hint", [1, 2]), ("hint", [3, 4])]
    ahead.came([batch(1, 2)])
    ahead.reach(2)
    assert log[2:] == [("hint", [5, 6])]
    ahead.came([batch(1, 2)])  # once more, as a rerun
    ahead.came([batch(5, 6)])  # one was skipped
    assert log[3:] == [("forget", [3, 4])]
    ahead.reach(5)
    assert log[4:] == [("hint", [7, 8])]
    assert loader.batch_sampler.consumed == 0


def test_data_that_begins_again(foreseen):
    ahead, log = foreseen
    ahead.follow(Loader([[1], [2]]), cyclic=True)
    ahead.reach(5)
    assert [texts for _, texts in log] == [[1], [2], [1], [2], [1]]


def test_data_without_an_order(foreseen):
    ahead, log = foreseen
    assert not ahead.follow(iter([batch(1)]), cyclic=False)
    ahead.reach(2)
    ahead.came([batch(1)])
    assert (log, ahead.any) == ([], False)
