"""Which answers of a step are of one pair, on one process."""

import pytest
import torch

from megatron_moe_inject.data.labels import ANSWERS, HostGroup
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.step import Step
from megatron_moe_inject.preference.pairing import pairing

ALONE = HostGroup(None, 0)


def step_of(*numbers, loss_mask=None):
    batches = [{} if row is None else {ANSWERS: torch.tensor(row).view(2, -1)} for row in numbers]
    labels = torch.zeros(len(numbers), 2, dtype=torch.int64)
    return Step(labels, [batches], 0, 16, True, max, max, loss_mask=loss_mask, as_read=batches)


def told(found):
    return found.pairs, found.places, found.rows.flatten(1).tolist(), found.tokens


def test_pairs_are_found_wherever_their_answers_are():
    found = pairing(step_of([20, -1], [7, 21], [-1, 6]), ALONE, None, 1)
    assert told(found) == (2, [2, 1, 3, 0], [[0, -1], [1, 2], [-1, 3]], 6 * 16)


def test_several_answers_in_a_sample():
    """Each document of a sample may be one."""
    rows = [[[20, 21, -1], [-1, -1, -1]], [[7, 6, -1], [4, 5, -1]]]
    found = pairing(step_of(*rows), ALONE, None, 3)
    assert found.pairs == 3
    assert found.places == [4, 5, 3, 2, 0, 1]
    assert found.rows.tolist() == [[[0, 1, -1], [-1, -1, -1]], [[2, 3, -1], [4, 5, -1]]]


def test_a_step_without_pairs():
    mask = torch.zeros(2, 2, 16, dtype=torch.bool)
    mask[0, 0, :5] = True
    found = pairing(step_of(None, None, loss_mask=mask), ALONE, None, 1)
    assert told(found) == (0, [], [[-1, -1], [-1, -1]], 5)


@pytest.mark.parametrize("numbers", [[20, -1], [20, 22], [21, 22], [20, 20], [21, 23]])
def test_an_answer_alone_is_an_error(numbers):
    with pytest.raises(RecipeError, match="an answer without the other one of its pair"):
        pairing(step_of(numbers), ALONE, None, 1)
