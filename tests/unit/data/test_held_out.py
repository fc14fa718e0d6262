"""The held-out text starts from its beginning each time, and nothing else is touched."""

import pytest
import torch

from megatron_moe_inject.data.held_out import HeldOutText


def loader(dataset, consumed):
    """A torch loader: making an iterator of it draws a random number."""
    return torch.utils.data.DataLoader(dataset[consumed:], batch_size=2)


@pytest.fixture
def built():
    train, valid, test = (list(range(start, start + 6)) for start in (0, 100, 200))
    text = HeldOutText(4)
    text.datasets((train, valid, test))
    iterators = [iter(text.loader(loader, data, 2)) for data in (train, valid, test)]
    return text, text.iterators(loader, iterators)


def test_validation_starts_over_and_the_others_go_on(built):
    text, (train, valid, test) = built
    assert [next(it).tolist() for it in (train, valid, test)] == [[2, 3], [100, 101], [202, 203]]
    assert next(valid).tolist() == [102, 103]
    assert text.restart(valid)
    assert next(valid).tolist() == [100, 101]
    assert not text.restart(test)
    assert not text.restart(None)
    assert next(test).tolist() == [204, 205]


def test_with_several_chunks_all_of_them_start_over(built):
    text, (_, valid, _) = built
    next(valid)
    assert text.restart([None, valid])
    assert next(valid).tolist() == [100, 101]
    assert not text.restart([None, None])


def test_what_was_consumed_does_not_matter_for_the_held_out_text():
    text, data = HeldOutText(4), [1, 2, 3, 4]
    text.datasets(([], data, []))
    # A stock loader would refuse to start behind the last sample.
    assert [batch.tolist() for batch in text.loader(loader, data, 100)] == [[1, 2], [3, 4]]


def test_only_what_is_read_is_asked_for():
    assert HeldOutText(24).num_samples((1000, 5000, 24)) == (1000, 24, 24)


def test_random_numbers_are_as_before(built):
    _, (_, valid, _) = built
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(valid)
    assert torch.equal(torch.rand(1), expected)


def test_ranks_that_read_nothing():
    text = HeldOutText(4)
    text.datasets((None, None, None))
    assert text.loader(lambda *_: None, None, 0) is None
    assert text.iterators(loader, (None, None, None)) == (None, None, None)
