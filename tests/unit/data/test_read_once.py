"""What is measured on: enough of it, each sample once, and an error that says how much there is."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_moe_inject.data import read_once
from megatron_moe_inject.data.read_once import MeasuredText
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.recipe.facts import StudentFacts

BATCH, LENGTH = 8, 32


class Part:
    """A dataset of Megatron's with so many samples in one reading, asked for ``asked``."""

    def __init__(self, once, asked):
        self._once, self.num_samples = once, asked
        self.config = SimpleNamespace(sequence_length=LENGTH, add_extra_token_to_sequence=1)

    def _get_num_tokens_per_epoch(self):
        return self._once * LENGTH + 5

    def __len__(self):
        return self._once if self.num_samples is None else max(self._once, self.num_samples)


class Blend:
    def __init__(self, once, weights, samples, surplus=0.005):
        asked = [None if weights is None else asks(samples, w, surplus) for w in weights or once]
        self.datasets = [Part(n, a) for n, a in zip(once, asked, strict=True)]
        self.weights = weights
        self.config = SimpleNamespace(mid_level_dataset_surplus=surplus)
        whole = sum(once)
        self._length = min(samples, whole) if weights is None else samples

    def __len__(self):
        return self._length


def asks(samples, weight, surplus):
    return math.ceil(math.ceil(samples * weight) * (1 + surplus))


def text(built, measured=("valid",), iterations=3, valid=("a", "b"), labels=(GENERAL, 0), **args):
    options = dict(eval_iters=iterations, eval_global_batch_size=BATCH, data_parallel_size=2)
    paths = {split: tuple(valid) for split in ("train", "valid", "test")}
    found = MeasuredText(
        Namespace(**options | args),
        StudentFacts(4, data_paths=paths),
        {split: list(labels) for split in paths},
        measured,
    )
    found.datasets(built)
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(read_once, "on_first_rank", lambda action: action())


def of_blend(once, weights, iterations, **options):
    valid = Blend(once, weights, iterations * BATCH)
    return text([None, valid, None], iterations=iterations, **options)


@pytest.mark.parametrize("weights", [[0.4, 0.6], None, [0.25, 0.75]], ids=str)
def test_the_largest_number_is_the_largest_that_passes(weights):
    def refused(iterations):
        try:
            of_blend([18, 40], weights, iterations).check()
        except RecipeError as error:
            return str(error)
        return None

    largest = max(n for n in range(1, 20) if refused(n) is None)
    assert all(refused(n) is None for n in range(1, largest + 1))
    said = refused(200)
    assert said.startswith(
        "--eval-iters 200: takes 1600 samples of validation text, of which there"
    )
    assert "18 of a, 40 of b" in said
    assert f"set it to {largest} or less" in said
    if weights is None:  # as they are, 58 samples
        assert largest == 7


def test_one_entry_and_one_that_is_too_short():
    built = [None, Part(18, 24), None]
    with pytest.raises(RecipeError, match=r"18 of a, .* set it to 2 or less"):
        text(built, valid=["a"], labels=[0]).check()
    text([None, Part(18, 16), None], iterations=2, valid=["a"], labels=[0]).check()
    with pytest.raises(RecipeError, match="evaluate in batches of less than 8 samples"):
        text([None, Part(7, 8), None], iterations=1, valid=["a"], labels=[0]).check()


def test_a_class_does_not_read_one_file_twice():
    twice = dict(valid=["x/a", "b", "x//a"], labels=[0, GENERAL, 0])
    with pytest.raises(RecipeError, match="--data-path: x/a stands twice"):
        of_blend([40, 40, 40], [0.3, 0.4, 0.3], 2, **twice).check()
    of_blend([40, 40, 40], [0.3, 0.4, 0.3], 2, **twice | dict(labels=[0, GENERAL, 1])).check()
    valid, test = Blend([40, 40], [0.5, 0.5], 16), Blend([40, 40], [0.5, 0.5], 16)
    profile = dict(measured=("valid", "test"), iterations=2)
    text([None, valid, test], **profile).check()  # by --split
    with pytest.raises(RecipeError, match="--test-data-path: a stands in the validation blend too"):
        text([None, valid, test], **profile, valid_data_path=["a", "b"]).check()


def test_sets_that_are_read_whole_need_no_number_of_batches():
    full = dict(full_validation=True)
    found = text([None, [Part(17, None), Part(40, None)], None], iterations=200, **full)
    found.check()
    twice = dict(valid=["x/a", "x//a"], labels=[0, 0], valid_data_path=["x/a", "x//a"])
    with pytest.raises(RecipeError, match="--valid-data-path: x/a stands twice"):
        text([None, [Part(17, None), Part(17, None)], None], **full, **twice).check()
    with pytest.raises(RecipeError, match="--full-validation: there is no validation data"):
        text([None, None, None], measured=(), **full).check()


def test_a_run_without_validation_data_is_told_at_start():
    train = Blend([40, 40], [0.5, 0.5], 16)
    for measured in ((), ("valid",), ("valid", "test")):
        with pytest.raises(RecipeError, match="there is no validation"):
            text([train, None, None], measured=measured).check()
    text([train, None, None], measured=(), iterations=0).check()
    with pytest.raises(RecipeError, match="set --eval-iters above 0"):
        text([train, train, None], iterations=0).check()
    text([None, None, Blend([40, 40], [0.5, 0.5], 24)], measured=("valid", "test")).check()


def test_a_run_that_measures_nothing_may_repeat_its_validation_text():
    text([None, Blend([8, 8], [0.5, 0.5], 24), None], measured=()).check()


def test_classes_that_training_reads_again():
    train = Blend([18, 400], [0.5, 0.5], 160)
    assert text([train, None, None]).repeated_in_training() == {GENERAL}
    assert text([None, None, None]).repeated_in_training() == set()


def test_the_first_chunk_that_has_data_is_looked_at_and_once():
    found = of_blend([18, 40], [0.4, 0.6], 2)
    found.datasets([None, None, None])
    found.check()
    found._check = None
    found.check()
