"""The original parameters and the packing of general samples, on one process."""

import pytest
import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.forward_passes import allowed_rounds
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.retention.borrowed import units
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.selected_pass import _packed


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("on_host", [False, True])
def test_inside_the_block_the_model_is_the_original_and_after_it_what_it_was(model, on_host):
    x = torch.randn(5, 3)
    before = model(x).detach()
    originals = OriginalParameters([model], {}, on_host=on_host)
    with torch.no_grad():
        model[1].weight.add_(1)
    trained, storage = model(x).detach(), model[1].weight.data_ptr()
    with originals.running():
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), trained)
    assert model[1].weight.data_ptr() == storage
    with pytest.raises(RuntimeError, match="in the middle"), originals.running():
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), trained)
    assert model[1].weight.data_ptr() == storage


@pytest.mark.parametrize("on_host", [False, True])
def test_only_what_trains_is_kept_twice(model, on_host):
    originals = OriginalParameters([model], {}, on_host=on_host)
    assert originals.bytes == 4 * (4 * 2 + 2)
    frozen, trained = model[0].weight, model[1].weight
    assert originals.of(frozen).data_ptr() == frozen.data_ptr()
    first = trained.detach().clone()
    with torch.no_grad():
        trained.zero_()
    assert torch.equal(originals.of(trained), first)
    assert not originals.of(trained).requires_grad
    assert torch.equal(originals.of(trained, slice(1, 5)), first.view(-1)[1:5])


class Gpt(torch.nn.Module):
    """What matters of Megatron's: where layers are, and that nothing but calls runs them."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)) for _ in range(3)
        )
        for i, layer in enumerate(self.decoder.layers):
            layer.layer_number = i + 1
        self.decoder.norm = torch.nn.LayerNorm(3)
        self.output_layer = torch.nn.Linear(3, 7, bias=False)
        self.output_layer.weight = self.embedding.weight

    def forward(self, ids):
        states = self.embedding(ids)
        for layer in self.decoder.layers:
            states = layer(states)
        return self.output_layer(self.decoder.norm(states))


def test_a_part_is_a_layer_or_what_owns_a_parameter_outside_of_layers():
    model = Gpt()
    model.decoder.layers[1].requires_grad_(False)
    found = units([model], {p for p in model.parameters() if p.requires_grad})
    first, _, last = model.decoder.layers
    assert list(found) == [first, last, model.embedding, model.decoder.norm]
    assert [len(own) for own in found.values()] == [4, 4, 1, 2]


@pytest.fixture
def moved():
    """A model whose original is in host memory and whose values have moved on; their places."""
    torch.manual_seed(0)
    model = Gpt()
    originals = OriginalParameters([model], {}, on_host=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model, originals, {p: p.data_ptr() for p in model.parameters()}


def elsewhere(storages):
    return {parameter for parameter, at in storages.items() if parameter.data_ptr() != at}


def test_from_host_memory_only_the_part_that_runs_has_its_original_values(moved):
    model, originals, storages = moved
    parts, seen = units([model], set(model.parameters())), []
    inner = {module: part for part in parts for module in part.modules()}
    for module, part in inner.items():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(
                lambda *_, part=part: seen.append((part, elsewhere(storages)))
            )
    with torch.no_grad(), originals.running():
        model(torch.arange(7))
        assert not elsewhere(storages)
    # a hook that was there before runs before a part's own, so a lone module sees nothing yet
    assert len(seen) == 8
    for part, found in seen:
        assert found == (set(parts[part]) if part in model.decoder.layers else set())


def test_from_host_memory_an_exception_inside_a_layer_leaves_everything_in_place(moved):
    model, originals, storages = moved

    def broken(*_):
        assert elsewhere(storages) == set(model.decoder.layers[1].parameters())
        raise RuntimeError("in the middle of a layer")

    model.decoder.layers[1][0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in the middle"), originals.running():
        model(torch.arange(7))
    assert not elsewhere(storages)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_part_that_begins_twice_is_left_in_place_all_the_same():
    """As where a loss runs what stands before a part's forward pass, and not what stands behind."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    originals = OriginalParameters([model], {}, on_host=True)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    trained, storage = model[0].weight.detach().clone(), model[0].weight.data_ptr()
    with originals.running():
        for _ in range(2):
            compat.run_forward_pre_hooks(model[0], torch.zeros(1, 3))
            assert torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, trained)
    assert model[0].weight.data_ptr() == storage
    assert torch.equal(originals.of(model[0].weight), before)


def test_general_samples_fill_micro_batches_in_order():
    batches = [
        {"tokens": torch.tensor([[i, i], [10 + i, i]]), "attention_mask": None} for i in range(3)
    ]
    general = torch.tensor([[GENERAL, 0], [0, 0], [GENERAL, GENERAL]]) == GENERAL
    packed = _packed(batches, general, rounds=3, size=2)
    assert [batch["tokens"][:, 0].tolist() for batch in packed] == [[0, 2], [12, 0], [0, 0]]
    assert all(batch["attention_mask"] is None for batch in packed)
    assert _packed(None, general, rounds=3, size=2) is None
    nothing = _packed(batches, general & False, rounds=1, size=2)
    assert nothing[0]["tokens"][:, 0].tolist() == [0, 0]
    small = _packed(batches, general, rounds=3, size=1)
    assert [batch["tokens"][:, 0].tolist() for batch in small] == [[0], [2], [12]]


def test_what_is_the_same_for_all_samples_is_not_copied():
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    batches = [{"tokens": torch.tensor([[i], [10 + i]]), "attention_mask": mask} for i in range(2)]
    general = torch.tensor([[False, True], [True, True]])
    for same, copied in ((["attention_mask"], False), ([], True)):
        packed = _packed(batches, general, rounds=2, size=2, same=same)
        assert [batch["tokens"].flatten().tolist() for batch in packed] == [[10, 1], [11, 0]]
        for batch in packed:
            assert torch.equal(batch["attention_mask"], mask)
            assert (batch["attention_mask"].data_ptr() != mask.data_ptr()) == copied


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("more", [0, 1, 2, 4, 5])
def test_the_original_runs_as_many_micro_batches_as_megatrons_schedule_takes(stages, more):
    group = stages + more

    def takes(number):  # schedules.forward_backward_pipelining_with_interleaving
        return group <= number and not 0 < number % group < stages

    for least in range(1, 60):
        expected = next(n for n in range(least, 200) if takes(n))
        assert allowed_rounds(least, stages, group) == expected
    assert allowed_rounds(7, 1, 1) == 7
