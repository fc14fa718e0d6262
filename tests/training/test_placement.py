"""The same global experts train at every expert-parallel size, and end in the same weights."""

from pathlib import Path

import pytest
import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness.checkpoints import SAVE, whole
from tests.harness.injection import RECIPE, inject

CHOSEN = {1: [0, 2], 2: [1], 3: [3]}
RECIPE = RECIPE.replace("{{2: [3], 3: [3]}}", "{{1: [0, 2], 2: [1], 3: [3]}}")
NAMES = [f"decoder.layers.mlp.experts.experts.linear_fc{i}.weight" for i in (1, 2)]


def _experts(folder):
    """Both matrices of all experts, ``[L, E, ...]`` each."""
    checkpoint = CheckpointPlace("--load", Path(folder)).open()
    return [whole(checkpoint, name) for name in NAMES]


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory):
    """The weights that one process ends with."""
    folder = tmp_path_factory.mktemp("placement") / "alone"
    inject(material, RECIPE, extra=(*SAVE, str(folder)))
    return _experts(folder)


@pytest.mark.parametrize("ep", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_global_experts_train_and_end_alike(material, alone, tmp_path, ep):
    save = tmp_path / "saved"
    inject(material, RECIPE, nproc=ep, ep=ep, extra=(*SAVE, str(save)))
    before, after = _experts(material.student), _experts(save)
    for start, single, end in zip(before, alone, after, strict=True):
        for layer in range(4):
            moved = [e for e in range(4) if not torch.equal(start[layer, e], end[layer, e])]
            assert moved == CHOSEN.get(layer, [])
        torch.testing.assert_close(end, single, rtol=1e-4, atol=1e-6)
        assert (end - start).abs().max() > 1e-3
