"""Several validation sets: filled up to whole batches, and the iterators in Megatron's order."""

from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.data import validation_sets
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.data.validation_sets import FilledUp, ValidationSets
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import GENERAL


def samples(number, value):
    return [{"tokens": torch.tensor([value, i]), "loss_mask": torch.ones(2)} for i in range(number)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(validation_sets, "on_first_rank", lambda action: action())

    def loader(dataset, consumed):
        return [dataset[place] for place in range(consumed, len(dataset))]

    monkeypatch.setattr(validation_sets.compat, "validation_loader", loader)


def megatron(datasets):
    """What Megatron's own function does, as far as the part looks at it."""

    def build(part):
        part.around["build_train_valid_test_datasets"](lambda: (None, datasets, None))
        return "train", "theirs", "test"

    return build


def built(part, datasets):
    return part.around["build_train_valid_test_data_iterators"](megatron(datasets), part)[1]


def sets(entries=2):
    args = Namespace(
        eval_iters=5,
        eval_global_batch_size=4,
        multiple_validation_sets=True,
        full_validation=True,
        validation_set_names=["a", "b"],
    )
    return ValidationSets(args, entries), args


def test_copies_fill_up_the_last_batch_and_no_token_of_them_counts():
    filled = FilledUp(samples(3, 7), 5)
    read = [filled[i] for i in range(len(filled))]
    assert [int(sample["tokens"][1]) for sample in read] == [0, 1, 2, 0, 0]
    assert [float(sample["loss_mask"].sum()) for sample in read] == [2, 2, 2, 0, 0]
    assert float(filled[0]["loss_mask"].sum()) == 2, "the first sample itself still counts"


def test_every_rank_evaluates_as_many_batches_of_a_set():
    part, args = sets()
    assert not part.exists
    iterators = built(part, [samples(3, 0), samples(9, 1)])
    assert args.eval_iters == [1, 3]
    assert part.samples == 16
    assert part.exists
    assert [sum(1 for _ in it) for it in iterators] == [4, 12]
    # A model chunk that reads nothing, for which Megatron counts anew.
    args.eval_iters = [None, None]
    assert built(part, [None, None]) == [None, None]
    assert args.eval_iters == [1, 3]


def test_a_set_says_which_entry_its_samples_are_of():
    part, _ = sets()
    iterators = built(part, [samples(3, 0), samples(9, 1)])
    registry = SplitRegistry({"train": [0], "valid": [GENERAL, 0], "test": [0]})
    registry.register(None, iterators, None)
    assert [registry.domain_of_entry(it) for it in iterators] == [[GENERAL], [0]]
    # One blend of both entries, whose samples say it themselves.
    part, _ = sets()
    (blend,) = built(part, [samples(4, 0)])
    registry.register(None, [blend], None)
    assert registry.domain_of_entry(blend) == [GENERAL, 0]


def test_sets_that_are_no_entries():
    part, _ = sets(entries=3)
    with pytest.raises(RecipeError, match="makes 2 sets of 3 entries"):
        built(part, [samples(3, 0), samples(9, 1)])


def evaluated(part, iterators):
    """What Megatron's function is given, and what the flags say meanwhile."""

    def stock(data_iterator):
        return data_iterator, dict(vars(part._args))

    return part.around["evaluate_and_print_results"](stock, data_iterator=iterators)


def test_megatron_gets_virtual_stages_set_by_set():
    part, _ = sets()
    first = built(part, [samples(3, 0), samples(9, 1)])
    last = built(part, [None, None])
    assert evaluated(part, first)[0] is first
    given, _ = evaluated(part, [first, last])
    assert given == [[first[0], None], [first[1], None]]
    assert part.restart([first, last])
    assert not part.restart([last, last])


def test_test_data_are_one_set():
    part, args = sets()
    built(part, [samples(3, 0), samples(9, 1)])
    given, flags = evaluated(part, "test")
    assert given == "test"
    assert not flags["multiple_validation_sets"]
    assert not flags["full_validation"]
    assert flags["validation_set_names"] is None
    assert flags["eval_iters"] == 5
    assert args.eval_iters == [1, 3]
    assert args.full_validation


def test_each_evaluation_begins_at_the_first_sample():
    part, _ = sets()
    iterators = built(part, [samples(3, 0), samples(9, 1)])
    assert int(next(iterators[0])["tokens"][1]) == 0
    assert int(next(iterators[0])["tokens"][1]) == 1
    evaluated(part, iterators)
    assert int(next(iterators[0])["tokens"][1]) == 0
