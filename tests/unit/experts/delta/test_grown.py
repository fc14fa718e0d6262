"""Deltas that bring new experts: one file that adds what was trained to the base before them."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.delta.index import INDEX, file_checksum
from megatron_moe_inject.experts.grow.stored_names import expert_name
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.gpt_names import stacked_axes
from megatron_moe_inject.host.new_experts import STORED, card_in
from megatron_moe_inject.host.torch_dist_copy import replaced, rewritten_copy
from tests.harness.checkpoints import whole
from tests.harness.stored_adapters import entry, write_adapters
from tests.harness.stored_moe import FORMS, write_moe

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
GROUPS = {
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_score_function": "sigmoid",
    "bias": "expert_bias",
    "moe_expert_capacity_factor": 2.0,
}


def do(*words):
    assert main([str(word) for word in words]) == 0


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def opened(folder):
    return CheckpointPlace("CKPT", folder).open()


def trained(checkpoint, output, chosen):
    """A checkpoint in which slices, by name and place, are others."""
    before = opened(checkpoint)
    changes = {}
    for name in before.tensors:
        value = whole(before, name)
        for place in itertools.product(*map(range, value.shape[: stacked_axes(name)])):
            if chosen(name, place):
                new = value[place] + torch.randn(value[place].shape)
                changes.setdefault(name, {})[place] = lambda new=new: new
    assert changes
    by_tensor = {name: replaced(slices) for name, slices in changes.items()}
    rewritten_copy(before, output, by_tensor, lambda items, total: items)
    return output


def same(one, other):
    """The same model: values bitwise, stored names, arguments."""
    one, other = opened(one), opened(other)
    names = one.metadata.state_dict_metadata.keys()
    assert names == other.metadata.state_dict_metadata.keys()
    for name in one.tensors:
        assert torch.equal(whole(one, name), whole(other, name)), name
    assert vars(one.args) == vars(other.args)


class Files:
    """A base, grown, trained, and the delta between them."""

    def __init__(self, root, form="stacked", chosen=None, **changed):
        self.root, self.base = root, write_moe(root / "base", form, **changed)
        self.grown, self.trained, self.delta = (root / n for n in ("grown", "trained", "delta"))
        words = ("--per-layer", "2", "--donors", "1,2", "--noise", "0.1", "--unmeasured")
        do("add-experts", self.base, "--output", self.grown, *words)
        self.new = card_in(opened(self.grown).args, "here").ids()
        trained(self.grown, self.trained, chosen or self.new_experts)
        between = ("--base", self.base, "--trained", self.trained)
        do("export-delta", *between, "--output", self.delta)

    def new_experts(self, name, place):
        """Slices of new experts."""
        known = expert_name(name)
        if known is None or known.kind != "expert":
            return False
        return (place[-1] if known.expert is None else known.expert) in self.new

    def apply(self, base=None):
        output = self.root / "applied"
        words = ("--delta", self.delta, "--output", output)
        do("apply-delta", "--base", base or self.base, *words)
        return output


def some(name, place):
    """Slices of old and new experts, and of what is none's."""
    return name == "output_layer.weight" or (".fc1." in name and sum(place) % 3 == 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changed", [{}, GROUPS], ids=["softmax", "groups"])
def test_applied_to_the_base_it_is_what_was_trained(tmp_path, form, changed):
    files = Files(tmp_path, form, some, **changed)
    same(files.apply(), files.trained)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changed", [{}, GROUPS], ids=["softmax", "groups"])
def test_taken_out_of_it_again_the_base_is_bitwise_there(tmp_path, form, changed):
    """The knowledge of the new experts is in one file, and can be switched off."""
    files = Files(tmp_path, form, **changed)
    index = json.loads((files.delta / INDEX).read_text())
    assert index["version"] == 3
    kinds = {name.rpartition(".mlp.")[2].partition(".")[0] for name in
             (slice_["tensor"] for slice_ in index["slices"].values())}  # fmt: skip
    assert kinds == {"experts", "router"}
    do("remove-experts", files.apply(), "--output", tmp_path / "without")
    same(tmp_path / "without", files.base)


def test_the_small_one_is_read_as_before(tmp_path):
    """A delta without new experts is what it was: version 1, no new key."""
    files = Files(tmp_path)
    words = ("--base", files.grown, "--trained", files.trained, "--output", tmp_path / "own")
    do("export-delta", *words)
    index = json.loads((tmp_path / "own" / INDEX).read_text())
    assert index["version"] == 1
    assert "new_experts" not in index
    words = ("--delta", tmp_path / "own", "--output", tmp_path / "applied")
    do("apply-delta", "--base", files.grown, *words)
    one, other = opened(tmp_path / "applied"), opened(files.trained)
    for name in one.tensors:
        assert torch.equal(whole(one, name), whole(other, name)), name
    assert hasattr(one.args, STORED)


class TestMistakes:
    @pytest.fixture
    def files(self, tmp_path):
        return Files(tmp_path, **GROUPS)

    def applied(self, capsys, files, base=None):
        out = files.root / "out"
        words = ("--base", base or files.base, "--delta", files.delta, "--output", out)
        error = refused(capsys, "apply-delta", *words)
        assert not out.exists()
        return error

    def test_another_base(self, files, capsys, tmp_path):
        def router(name, place):
            return name.endswith("router.weight") and place == (1,)

        other = trained(files.base, tmp_path / "another", router)
        error = self.applied(capsys, files, other)
        assert "holds other values of decoder.layers.mlp.router.weight [1] than" in error

    def test_a_base_that_has_them_already(self, files, capsys):
        error = self.applied(capsys, files, files.grown)
        assert "has new experts (2, 5 of 6), which the delta's base has not" in error
        assert error.endswith(f"apply it to {files.base / 'iter_0000007'}\n")

    def test_a_delta_of_the_grown_base(self, files, capsys, tmp_path):
        words = ("--base", files.grown, "--trained", files.trained, "--output", tmp_path / "own")
        do("export-delta", *words)
        words = ("--base", files.base, "--delta", tmp_path / "own", "--output", tmp_path / "out")
        error = refused(capsys, "apply-delta", *words)
        assert "has fewer experts than the delta's base; name the checkpoint with new" in error

    def test_adapters_beside(self, files, capsys, tmp_path):
        adapted = tmp_path / "adapted"
        write_adapters(files.trained, adapted, {(FC1, (1, 2)): [0]}, [entry(1, 1.0)])
        words = ("--base", files.base, "--trained", adapted, "--output", tmp_path / "out")
        error = refused(capsys, "export-delta", *words)
        assert "has adapters, and new experts that" in error
        assert "merge the adapters first (moe-inject merge-adapters)" in error
        words = ("--base", files.trained, "--trained", adapted, "--output", tmp_path / "out")
        do("export-delta", *words)
        words = ("--base", files.trained, "--delta", tmp_path / "out", "--output", tmp_path / "a")
        do("apply-delta", *words)
        do("merge-adapters", "--trained", adapted, "--output", tmp_path / "m")
        same_new = (whole(opened(tmp_path / f), FC1)[1, 2] for f in ("a", "m"))
        assert torch.equal(*same_new)
        words = ("--base", files.base, "--trained", tmp_path / "m", "--output", tmp_path / "whole")
        do("export-delta", *words)
        words = ("--base", files.base, "--delta", tmp_path / "whole", "--output", tmp_path / "b")
        do("apply-delta", *words)
        assert torch.equal(whole(opened(tmp_path / "b"), FC1), whole(opened(tmp_path / "m"), FC1))

    def change(self, files, change):
        """Rewrite the delta's description."""
        path = files.delta / INDEX
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    def test_one_that_lacks_a_new_expert(self, files, capsys):
        name = f"{FC1}@1.5"
        file = next(files.delta.glob("*.safetensors"))
        save_file({n: t for n, t in load_file(file).items() if n != name}, file)

        def without(index):
            del index["slices"][name]
            index["files"][file.name] = file_checksum(file)

        self.change(files, without)
        assert f"lacks {FC1} [1, 5] of its new experts" in self.applied(capsys, files)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda index: index["slices"][f"{FC1}@1.5"].update(place=[1, 6]), "that is none of"),
            (lambda index: index["slices"][f"{FC1}@1.5"].update(place=[7, 5]), "that is none of"),
            (lambda index: index["slices"][f"{FC1}@1.5"].update(place=[1]), "that is none of"),
            (lambda index: index["slices"][f"{FC1}@1.5"].update(place=[]), "that is none of"),
            (lambda index: index["slices"][f"{FC1}@1.5"].update(place=[1, 2]), "that is none of"),
            (lambda index: index["new_experts"].update(moved=[0, 1, 3, 3]), "names an id twice"),
            (lambda index: index["new_experts"].update(experts=9), "of its new experts"),
            (lambda index: index.update(new_experts=None), "is of version 3"),
        ],
    )
    def test_a_description_that_cannot_be(self, files, capsys, change, message):
        self.change(files, change)
        assert message in self.applied(capsys, files)
