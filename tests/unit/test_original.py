"""The original parameters and the packing of general samples, on one process."""

import pytest
import torch

from megatron_moe_inject.experts.original import OriginalParameters
from megatron_moe_inject.original_pass import _packed
from megatron_moe_inject.recipe import GENERAL


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def test_inside_the_block_the_model_is_the_original_and_after_it_what_it_was(model):
    x = torch.randn(5, 3)
    before = model(x).detach()
    originals = OriginalParameters([model], {})
    with torch.no_grad():
        model[1].weight.add_(1)
    trained, storage = model(x).detach(), model[1].weight.data_ptr()
    with originals.swapped():
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), trained)
    assert model[1].weight.data_ptr() == storage
    with pytest.raises(RuntimeError, match="in the middle"), originals.swapped():
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), trained)
    assert model[1].weight.data_ptr() == storage


def test_only_what_trains_is_kept_twice(model):
    originals = OriginalParameters([model], {})
    assert originals.bytes == 4 * (4 * 2 + 2)
    frozen, trained = model[0].weight, model[1].weight
    assert originals.of(frozen).data_ptr() == frozen.data_ptr()
    first = trained.detach().clone()
    with torch.no_grad():
        trained.zero_()
    assert torch.equal(originals.of(trained), first)
    assert not originals.of(trained).requires_grad


def test_general_samples_fill_micro_batches_in_order():
    batches = [
        {"tokens": torch.tensor([[i, i], [10 + i, i]]), "attention_mask": None} for i in range(3)
    ]
    general = torch.tensor([[GENERAL, 0], [0, 0], [GENERAL, GENERAL]]) == GENERAL
    packed = _packed(batches, general, rounds=3)
    assert [batch["tokens"][:, 0].tolist() for batch in packed] == [[0, 2], [12, 0], [0, 0]]
    assert all(batch["attention_mask"] is None for batch in packed)
    assert _packed(None, general, rounds=3) is None
    nothing = _packed(batches, general & False, rounds=1)
    assert nothing[0]["tokens"][:, 0].tolist() == [0, 0]
