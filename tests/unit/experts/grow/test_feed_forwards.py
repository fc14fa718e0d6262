"""Neurons of a dense teacher as new experts: together they are its feed-forward."""

from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.grow.add import Asked, add_experts
from megatron_moe_inject.experts.grow.feed_forwards import layers_of_teacher
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from tests.harness.checkpoints import whole
from tests.harness.stored_moe import HIDDEN, LAYERS, WIDTH, read, write_moe
from tests.harness.tiny_folders import save_folder

FC1, FC2 = (f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
KIND = {"hidden_size": HIDDEN, "swiglu": True, "add_bias_linear": False}


def write_dense(root, *, layers=2, neurons=2 * WIDTH, hidden=HIDDEN, bias=False, by_layer=False,
                **changed):  # fmt: skip
    """A dense checkpoint of random feed-forwards, whose later neurons are the larger ones."""
    torch.manual_seed(5)
    larger = torch.linspace(1, 2, neurons)
    whole = {
        "linear_fc1.weight": torch.randn(layers, 2, neurons, hidden) * larger[:, None],
        "linear_fc2.weight": torch.randn(layers, hidden, neurons) * larger,
    }
    whole["linear_fc1.weight"] = whole["linear_fc1.weight"].flatten(1, 2)
    if bias:
        whole["linear_fc1.bias"] = torch.randn(layers, 2 * neurons)
        whole["linear_fc2.bias"] = torch.randn(layers, hidden)
    with CheckpointWriter(root / "release") as writer:
        for name, value in whole.items():
            for layer, own in enumerate(value):
                if by_layer:
                    writer.tensor([f"decoder.layers.{layer}.mlp.{name}"], own.shape, (), own)
                else:
                    writer.tensor([f"decoder.layers.mlp.{name}"], value.shape, (layer,), own)
        writer.finish({"args": Namespace(**KIND | changed), "checkpoint_version": 3.0})
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root, whole


def feed_forward(first, second, x):
    gate, up = (x @ first.float().T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ second.float().T


def opened(folder):
    return CheckpointPlace("CKPT", folder).open()


def grow(base, output, teacher, **asked):
    asked = {"per_layer": 2, "weights": f"teacher:megatron:{teacher}", **asked}
    return add_experts(
        CheckpointPlace("CKPT", base), output, Asked(**asked), progress=lambda items, n: items
    )


def new_experts(folder, form="stacked"):
    """``[L, n, ...]`` of both matrices."""
    return (read(opened(folder), form, name)[:, 4:] for name in (FC1, FC2))


@pytest.mark.parametrize("form", ["stacked", "by_layer", "named"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_experts_together_are_the_teacher_s_feed_forward(tmp_path, form, by_layer):
    base = write_moe(tmp_path / "base", form, **KIND)
    teacher, held = write_dense(tmp_path / "teacher", by_layer=by_layer)
    card = grow(base, tmp_path / "grown", teacher).card
    assert (card.weights, card.noise) == (f"teacher:megatron:{teacher}", 0.0)
    firsts, seconds = new_experts(tmp_path / "grown", form)
    x = torch.randn(7, HIDDEN)
    for layer, theirs in enumerate((0, 1, 1)):
        parts = [feed_forward(*pair, x) for pair in zip(firsts[layer], seconds[layer], strict=True)]
        whole_one = (held[f"linear_fc{n}.weight"][theirs] for n in (1, 2))
        torch.testing.assert_close(sum(parts), feed_forward(*whole_one, x))


def test_the_most_important_are_dealt_out_in_turns(tmp_path):
    """In the teacher's order within an expert; the least important ones are left out."""
    base = write_moe(tmp_path / "base", **KIND)
    teacher, held = write_dense(tmp_path / "teacher", layers=1, neurons=3 * WIDTH)
    grow(base, tmp_path / "grown", teacher)
    first, second = (held[f"linear_fc{n}.weight"][0] for n in (1, 2))
    neurons = zip(*first.view(2, -1, HIDDEN), second.T, strict=True)
    norms = [float(gate.norm() * up.norm() * down.norm()) for gate, up, down in neurons]
    ranked = sorted(range(3 * WIDTH), key=lambda neuron: -norms[neuron])
    firsts, seconds = new_experts(tmp_path / "grown")
    for number in range(2):
        own = sorted(ranked[number : 2 * WIDTH : 2])
        assert torch.equal(seconds[0, number], second[:, own])
        assert torch.equal(firsts[0, number], torch.cat([half[own] for half in first.chunk(2)]))


def test_layers_that_are_not_asked_for_are_filled_as_ever(tmp_path):
    base = write_moe(tmp_path / "base", **KIND)
    teacher, held = write_dense(tmp_path / "teacher")
    grow(base, tmp_path / "grown", teacher, layers=[1], teacher_layers=[0])
    firsts, seconds = new_experts(tmp_path / "grown")
    old = read(opened(base), "stacked", FC1)
    for layer in (0, 2):
        assert torch.equal(firsts[layer], old[layer, :2])
    x = torch.randn(3, HIDDEN)
    parts = [feed_forward(*pair, x) for pair in zip(firsts[1], seconds[1], strict=True)]
    both = (held[f"linear_fc{n}.weight"][0] for n in (1, 2))
    torch.testing.assert_close(sum(parts), feed_forward(*both, x))


def test_main_parameters_and_noise_go_with_it(tmp_path):
    base = write_moe(tmp_path / "base", states=True, dtype=torch.bfloat16, **KIND)
    teacher, held = write_dense(tmp_path / "teacher", layers=LAYERS)
    for folder, noise in (("plain", None), ("noisy", 0.1)):
        grow(base, tmp_path / folder, teacher, noise=noise)
    for folder in ("plain", "noisy"):
        checkpoint = opened(tmp_path / folder).with_training_state()
        model, main = (
            read(checkpoint, "stacked", FC2, prefix)[:, 4:]
            for prefix in ("", "optimizer.state.fp32_param.")
        )
        assert torch.equal(model, main.bfloat16())
        theirs = held["linear_fc2.weight"]
        exact = main.sum((1, 3)) - theirs.sum(2)
        assert (exact.abs().max() < 1e-4) == (folder == "plain")


def test_a_folder_and_its_import_are_the_same_teacher(tmp_path):
    """Qwen3 for a Qwen3-MoE, by the command: two experts of 24 are a feed-forward of 48."""
    for case, folder in (("qwen3", "dense"), ("qwen3_moe", "moe")):
        save_folder(case, tmp_path / folder)
        words = ["import-hf", str(tmp_path / folder), "--output", str(tmp_path / f"{folder}-ck")]
        assert main(words) == 0
    grown = []
    for number, source in enumerate(("hf:" + str(tmp_path / "dense"),
                                     "megatron:" + str(tmp_path / "dense-ck"))):  # fmt: skip
        grown.append(tmp_path / f"grown{number}")
        words = ["add-experts", str(tmp_path / "moe-ck"), "--output", str(grown[-1])]
        words += ["--per-layer", "2", "--unmeasured", "--weights", f"teacher:{source}"]
        assert main(words) == 0
    one, other = map(opened, grown)
    for name in one.tensors:
        assert torch.equal(whole(one, name), whole(other, name)), name
    firsts, seconds = (whole(one, f"decoder.layers.{name}")[:, 4:] for name in (FC1, FC2))
    dense = opened(tmp_path / "dense-ck")
    x = torch.randn(5, 32)
    for layer in range(2):
        parts = [feed_forward(*pair, x) for pair in zip(firsts[layer], seconds[layer], strict=True)]
        both = (whole(dense, f"decoder.layers.mlp.linear_fc{n}.weight")[layer] for n in (1, 2))
        torch.testing.assert_close(sum(parts), feed_forward(*both, x))


MISTAKES = {
    "activation": ({}, {"swiglu": False}, {}, "the teacher has --swiglu None, the student True"),
    "clamp": ({"activation_func_clamp_value": 7.0}, {}, {},
              "the teacher has --activation-func-clamp-value None, the student 7.0"),
    "hidden": ({}, {"hidden": 8}, {}, "the teacher's hidden size is 8, the student's 6"),
    "many": ({}, {}, {"per_layer": 3}, "has 10 neurons, and 3 new experts of 5 need 15; "
             "--per-layer can be 2 at most"),
    "small": ({}, {"neurons": 4}, {}, "need 10; use copy or mean"),
    "bias": ({}, {"bias": True}, {}, "has biases, and the student's experts have none"),
    "latent": ({"moe_latent_size": 4}, {}, {}, "work in a latent space of 4"),
    "number": ({}, {}, {"teacher_layers": [0]}, "--teacher-layers: '0' has 1, for 3 layers"),
    "layer": ({}, {}, {"teacher_layers": [0, 1, 2]}, "2 is none of the teacher's; name some of 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_what_does_not_fit_is_one_error(tmp_path, case):
    student, dense, asked, message = MISTAKES[case]
    base = write_moe(tmp_path / "base", **KIND | student)
    teacher, _ = write_dense(tmp_path / "teacher", **dense)
    with pytest.raises(RecipeError) as error:
        grow(base, tmp_path / "grown", teacher, **asked)
    assert message in str(error.value)
    assert not (tmp_path / "grown").exists()


def test_a_model_without_dense_layers_is_no_teacher(tmp_path):
    base = write_moe(tmp_path / "base", **KIND)
    with pytest.raises(RecipeError, match="has no dense feed-forward; name a dense model's"):
        grow(base, tmp_path / "grown", base)


def test_the_same_depth():
    depths = {layer: (layer + 0.5) / 8 for layer in range(8)}
    assert layers_of_teacher(None, [0, 3, 7], depths, 4) == {0: 0, 3: 1, 7: 3}
    assert layers_of_teacher(None, list(range(8)), depths, 12)[7] == 11
    assert layers_of_teacher([2, 0], [3, 7], depths, 4) == {3: 2, 7: 0}
