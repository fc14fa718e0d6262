"""Experts as one dense feed-forward: what it computes, which experts are in it, what is refused."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.convert.densify import Asked, Densifying
from megatron_moe_inject.convert.expert_groups import (
    Gates,
    grouped,
    most_different,
    squared_norm,
)
from megatron_moe_inject.convert.neurons import Merging, Neurons, matching, side_by_side, widened
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.stored_checkpoint import StoredCheckpoint, joined_checksum
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from tests.harness.checkpoints import whole
from tests.harness.profiles import from_counts
from tests.harness.stored_moe import EXPERTS, FORMS, HIDDEN, LAYERS, WIDTH, arguments, write_moe

SWIGLU = Namespace(swiglu=True)
STORED = {"hidden_size": HIDDEN, "params_dtype": torch.float32, "swiglu": True}
KINDS = [
    pytest.param(Namespace(swiglu=True), 2, id="swiglu"),
    pytest.param(Namespace(squared_relu=True), 1, id="squared-relu"),
    pytest.param(
        Namespace(quick_geglu=True, activation_func_clamp_value=0.5, glu_linear_offset=1.0), 2,
        id="gpt-oss",
    ),
]  # fmt: skip


def neurons(seed, width=8, hidden=6, matrices=2, bias=False):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size):
        return torch.randn(size, generator=generator)

    return Neurons(
        drawn(matrices, width, hidden),
        drawn(matrices, width) if bias else None,
        drawn(hidden, width),
        drawn(hidden) if bias else None,
    )


def inputs(count=32, hidden=6):
    return torch.randn((count, hidden), generator=torch.Generator().manual_seed(9))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("args", "matrices"), KINDS)
def test_side_by_side_is_the_weighed_sum(args, matrices, bias):
    parts = [neurons(seed, 4 + seed, matrices=matrices, bias=bias) for seed in range(3)]
    weights = (1.0, 0.5, 0.2)
    sum_of = sum(w * p.outputs(inputs(), args) for w, p in zip(weights, parts, strict=True))
    weighed = [part.weighed(weight) for weight, part in zip(weights, parts, strict=True)]
    close(side_by_side(weighed).outputs(inputs(), args), sum_of)


@pytest.mark.parametrize(("args", "matrices"), KINDS)
def test_neurons_that_fill_the_width_give_nothing_and_can_learn(args, matrices):
    before = neurons(0, matrices=matrices, bias=True)
    after = widened(before, 20, 0.02, torch.Generator().manual_seed(1))
    assert after.width == 20
    assert torch.equal(after.second[:, 8:], torch.zeros(6, 12))
    assert (after.first[:, 8:] != 0).all()
    close(after.outputs(inputs(), args), before.outputs(inputs(), args))


def test_biases_of_one_part_alone_are_zeros_of_the_others():
    shared, routed = neurons(0, bias=False), neurons(1, bias=True)
    both = side_by_side([shared, routed])
    expected = shared.outputs(inputs(), SWIGLU) + routed.outputs(inputs(), SWIGLU)
    close(both.outputs(inputs(), SWIGLU), expected)


class TestMerging:
    def test_a_shuffled_copy_is_matched_neuron_by_neuron(self):
        model = neurons(0, 16)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
        shuffled = model.ordered(order)
        assert torch.equal(order[matching(model, shuffled)], torch.arange(16))
        merging = Merging(model)
        merging.add(shuffled, 0.3)
        assert torch.equal(merging.merged().first, model.first)
        assert torch.equal(merging.merged().second, model.second)

    def test_others_are_averaged_by_their_shares(self):
        model = neurons(0, 16, bias=True)
        near = [
            Neurons(*(t + 0.01 * torch.randn(t.shape) for t in vars(model).values()))
            for _ in range(2)
        ]
        merging = Merging(model)
        for other, share in zip(near, (0.5, 0.2), strict=True):
            order = torch.randperm(16)
            merging.add(other.ordered(order), share)
        merged = merging.merged()
        for name, value in vars(model).items():
            expected = 0.3 * value + 0.5 * getattr(near[0], name) + 0.2 * getattr(near[1], name)
            close(getattr(merged, name), expected)

    def test_every_neuron_is_in_one_pair_whatever_the_ties(self):
        model = neurons(0, 12)
        same = Neurons(
            model.first[:, :1].expand(2, 12, 6), None, model.second[:, :1].expand(6, 12), None
        )
        assert sorted(matching(model, same).tolist()) == list(range(12))
        assert sorted(matching(same, same).tolist()) == list(range(12))


def gram_of(outputs):
    return (outputs @ outputs.T).double()


class TestGroups:
    """Which experts are taken."""

    outputs = torch.tensor(
        # two twins, a weak third that differs, and a strong one that is nearly a twin
        [[2.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 1.0, 0, 0], [3.0, 0.1, 0, 0]],
        dtype=torch.float64,
    )
    gates = Gates.uniform(4, 2, 1.0)

    def test_most_different_has_the_largest_volume(self):
        torch.manual_seed(0)
        outputs = torch.randn(6, 40, dtype=torch.float64) * torch.arange(1, 7)[:, None]
        kernel = gram_of(outputs)
        taken = most_different(kernel, 6)
        for number in range(1, 6):
            *before, last = taken[:number]
            volumes = {
                e: torch.linalg.det(kernel[[*before, e]][:, [*before, e]])
                for e in range(6)
                if e not in before
            }
            assert max(volumes, key=volumes.__getitem__) == last

    def test_those_that_differ_are_taken_and_stand_for_their_twins(self):
        groups = grouped("concatenate", "output", self.gates, gram_of(self.outputs), 2)
        assert [group.members for group in groups] == [(2,), (3,)]
        assert [group.weight for group in groups] == [0.25, 0.75]

    def test_merging_takes_the_twins_in(self):
        groups = grouped("merge", "output", self.gates, gram_of(self.outputs), 2)
        assert [group.members for group in groups] == [(2,), (3, 0, 1)]
        assert groups[1].shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))

    def test_the_highest_scores_are_kept_with_all_the_weight(self):
        groups = grouped("keep", "output", self.gates, gram_of(self.outputs), 2)
        assert [group.members for group in groups] == [(0,), (3,)]
        assert [group.weight for group in groups] == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("score", "taken"), [("output", [1, 3]), ("gate", [0, 1]), ("token", [0, 2])]
    )
    def test_scores(self, score, taken):
        gates = Gates(
            torch.tensor([0.4, 0.35, 0.1, 0.15], dtype=torch.float64),
            torch.tensor([0.9, 0.4, 0.5, 0.2], dtype=torch.float64),
            torch.zeros(4, 4, dtype=torch.float64),
        )
        gram = gram_of(torch.diag(torch.tensor([1.0, 4, 1, 9], dtype=torch.float64)))
        groups = grouped("keep", score, gates, gram, 2)
        assert [group.members[0] for group in groups] == taken

    @pytest.mark.parametrize("method", ["concatenate", "merge", "keep"])
    def test_whole_weight_is_given_out_and_experts_without_any_are_last(self, method):
        torch.manual_seed(0)
        mean = torch.tensor([0.5, 0, 0.3, 0.2, 0.0], dtype=torch.float64)
        gates = Gates(mean, mean.clamp(max=0.4), torch.zeros(5, 5, dtype=torch.float64))
        gram = gram_of(torch.randn(5, 30, dtype=torch.float64))
        for count in range(1, 6):
            groups = grouped(method, "output", gates, gram, count)
            assert sum(group.weight for group in groups) == pytest.approx(1.0)
            kept = {group.members[0] for group in groups}
            assert len(kept) == count
            assert kept <= {0, 2, 3} or {0, 2, 3} <= kept


def test_squared_norm_is_that_of_the_routed_sum():
    torch.manual_seed(0)
    outputs = torch.randn(5, 2000, 8, dtype=torch.float64)  # [E, tokens, h]
    chosen = torch.rand(2000, 5).argsort(1)[:, :2]
    gates = torch.zeros(2000, 5, dtype=torch.float64).scatter(1, chosen, 0.5)
    routed = torch.einsum("te,eth->th", gates, outputs)
    hits = (gates > 0).double()
    known = Gates(gates.mean(0), hits.mean(0), hits.T @ hits / 2000)
    gram = torch.einsum("eth,fth->ef", outputs, outputs) / 2000
    measured = float(routed.square().sum(1).mean())
    assert squared_norm(known, gram) == pytest.approx(measured, rel=0.05)
    same = torch.ones(5, 5, dtype=torch.float64)
    assert squared_norm(known, same) == pytest.approx(1.0)


def densified(base, output, progress=lambda items, total: items, **asked):
    return Densifying(CheckpointPlace("CKPT", base), Asked(**asked)).write(output, progress)


def dense_tensors(folder):
    """``[L, ...]`` by name, whatever the form."""
    checkpoint = CheckpointPlace("CKPT", folder).open()
    found = {}
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        stacked = f"decoder.layers.mlp.{name}"
        if stacked in checkpoint.tensors:
            found[name] = whole(checkpoint, stacked)
        else:
            parts = [f"decoder.layers.{layer}.mlp.{name}" for layer in range(LAYERS)]
            found[name] = torch.stack([whole(checkpoint, part) for part in parts])
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["concatenate", "merge", "keep"])
def test_every_form_of_a_checkpoint_gives_the_same(tmp_path, form, method):
    for name in {form, "stacked"}:
        write_moe(tmp_path / name, name, **STORED)
        densified(tmp_path / name, tmp_path / f"{name}-dense", width=2 * WIDTH + 1, method=method)
    ours, usual = (dense_tensors(tmp_path / f"{name}-dense") for name in (form, "stacked"))
    assert ours["linear_fc1.weight"].shape == (LAYERS, 2 * (2 * WIDTH + 1), HIDDEN)
    for name, value in usual.items():
        assert torch.equal(value, ours[name])


@pytest.mark.parametrize("scale", ["expected", "norm"])
def test_all_experts_give_the_sum_by_their_mean_gates(tmp_path, scale):
    base = write_moe(tmp_path / "moe", **STORED)
    counts = np.arange(1, LAYERS * EXPERTS + 1).reshape(LAYERS, EXPERTS) * 12
    gate_sums = counts * np.linspace(0.2, 0.8, EXPERTS)
    profile = from_counts(counts, gate_sums, topk=2)
    write_profile(tmp_path / "profile.json", profile)
    written = densified(
        *(base, tmp_path / "dense"),
        width=EXPERTS * WIDTH, profile=str(tmp_path / "profile.json"), scale=scale,
    )  # fmt: skip
    stored = dense_tensors(tmp_path / "dense")
    checkpoint = CheckpointPlace("CKPT", base).open()
    first, second = (
        whole(checkpoint, f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight") for n in (1, 2)
    )
    tokens = profile.classes["code"].tokens
    for layer in range(LAYERS):
        expected = torch.zeros(32, HIDDEN)
        for expert in range(EXPERTS):
            gate, up = first[layer, expert].chunk(2)
            between = torch.nn.functional.silu(inputs() @ gate.T) * (inputs() @ up.T)
            mean = float(gate_sums[layer, expert] / tokens[layer])
            expected += mean * between @ second[layer, expert].T
        gate, up = stored["linear_fc1.weight"][layer].chunk(2)
        between = torch.nn.functional.silu(inputs() @ gate.T) * (inputs() @ up.T)
        actual = between @ stored["linear_fc2.weight"][layer].T
        close(actual, written.scaled[layer] * expected)
    factors = list(written.scaled.values())
    assert (min(factors) > 1.05) if scale == "norm" else factors == [1.0] * LAYERS
    assert written.kept == dict.fromkeys(range(LAYERS), pytest.approx(1.0))


def test_classes_of_a_profile_are_told_apart(tmp_path):
    base = write_moe(tmp_path / "moe", **STORED)
    code, general = np.zeros((2, LAYERS, EXPERTS), dtype=int)
    code[:, :2], general[:, 2:] = 8, 8
    path = tmp_path / "profile.json"
    write_profile(path, from_counts(code, topk=2, general=general))
    for domain, kept in (("code", {0, 1}), ("general", {2, 3})):
        written = densified(
            *(base, tmp_path / domain), width=2 * WIDTH, profile=str(path), domains=[domain]
        )
        for groups in written.groups.values():
            assert {group.members[0] for group in groups} == kept
    assert set(densified(base, tmp_path / "all", width=2 * WIDTH, profile=str(path)).kept) == {
        0, 1, 2,
    }  # fmt: skip


def write_shared(root, gated=False, dense_first=None, **changed):
    """A model with a shared expert, and a dense layer of ``dense_first`` neurons if asked for."""
    torch.manual_seed(2)
    layers = 2
    given = {
        **STORED,
        "num_layers": layers,
        "moe_layer_freq": 1 if dense_first is None else [0, 1],
        "moe_shared_expert_intermediate_size": 7,
    }
    with CheckpointWriter(root / "iter_0000001") as writer:

        def put(layer, name, *size):
            writer.tensor([f"decoder.layers.{layer}.{name}"], size, (), torch.randn(size))

        def put_experts(layer, name, *size):
            key = f"decoder.layers.{layer}.mlp.experts.experts.{name}"
            for expert in range(EXPERTS):
                writer.tensor([key], (EXPERTS, *size), (expert,), torch.randn(size))

        for layer in range(layers):
            put(layer, "pre_mlp_layernorm.weight", HIDDEN)
            if layer == 0 and dense_first is not None:
                put(layer, "mlp.linear_fc1.weight", 2 * dense_first, HIDDEN)
                put(layer, "mlp.linear_fc2.weight", HIDDEN, dense_first)
                continue
            put_experts(layer, "linear_fc1.weight", 2 * WIDTH, HIDDEN)
            put_experts(layer, "linear_fc2.weight", HIDDEN, WIDTH)
            put(layer, "mlp.router.weight", EXPERTS, HIDDEN)
            put(layer, "mlp.router.expert_bias", EXPERTS)
            put(layer, "mlp.shared_experts.linear_fc1.weight", 14, HIDDEN)
            put(layer, "mlp.shared_experts.linear_fc2.weight", HIDDEN, 7)
            if gated:
                put(layer, "mlp.shared_experts.gate_weight", 1, HIDDEN)
        common = {"args": arguments(**given | changed), "iteration": 1, "checkpoint_version": 3.0}
        writer.finish(common)
    return root / "iter_0000001"


@pytest.mark.parametrize("gate", [None, 0.25])
def test_the_shared_expert_comes_first_and_alone_is_exact(tmp_path, gate):
    base = write_shared(tmp_path, gated=gate is not None)
    before = CheckpointPlace("CKPT", base).open()
    for width in (7, 7 + WIDTH):
        densified(base, tmp_path / f"{width}", width=width, shared_gate=gate)
        after = CheckpointPlace("CKPT", tmp_path / f"{width}").open()
        assert not any("experts" in name or "router" in name for name in after.tensors)
        for layer in range(2):
            first, second = (
                whole(before, f"decoder.layers.{layer}.mlp.shared_experts.linear_fc{n}.weight")
                for n in (1, 2)
            )
            ours = whole(after, f"decoder.layers.{layer}.mlp.linear_fc1.weight")
            assert torch.equal(ours.unflatten(0, (2, -1))[:, :7].flatten(0, 1), first)
            ours = whole(after, f"decoder.layers.{layer}.mlp.linear_fc2.weight")
            assert torch.equal(ours[:, :7], second * (gate or 1.0))


def test_layers_that_are_dense_already_are_kept_and_widened(tmp_path):
    base = write_shared(tmp_path, dense_first=12)
    densified(base, tmp_path / "dense", width=7 + 2 * WIDTH)
    before, after = (CheckpointPlace("CKPT", path).open() for path in (base, tmp_path / "dense"))
    first = whole(before, "decoder.layers.0.mlp.linear_fc1.weight")
    second = whole(before, "decoder.layers.0.mlp.linear_fc2.weight")
    ours = whole(after, "decoder.layers.mlp.linear_fc1.weight")[0].unflatten(0, (2, -1))
    assert ours.shape == (2, 17, HIDDEN)
    assert torch.equal(ours[:, :12].flatten(0, 1), first)
    columns = whole(after, "decoder.layers.mlp.linear_fc2.weight")[0]
    assert torch.equal(columns[:, :12], second)
    assert not columns[:, 12:].any()
    assert ours[:, 12:].all()
    with pytest.raises(Exception, match="is less than the 12 neurons of the layers 0, which are"):
        densified(base, tmp_path / "narrow", width=11)


def test_arguments_are_a_dense_model_s(tmp_path):
    base = write_shared(tmp_path, moe_router_topk_scaling_factor=2.5, inject_policy={"a": 1})
    densified(base, tmp_path / "dense", width=12)
    args = CheckpointPlace("CKPT", tmp_path / "dense").open().args
    assert (args.num_experts, args.ffn_hidden_size, args.moe_layer_freq) == (None, 12, 1)
    assert args.moe_router_topk_scaling_factor is None
    assert args.moe_shared_expert_intermediate_size is None
    assert not hasattr(args, "inject_policy")


def test_the_command_says_what_it_did(tmp_path, capsys):
    base = write_shared(tmp_path)
    command = ["densify", str(base), "--output", str(tmp_path / "d"), "--ffn-hidden-size", "13"]
    assert main([*command, "--scale", "norm"]) == 0
    said = capsys.readouterr().out
    assert "the shared expert's 7, 1 of 4 experts of 5 neurons, 1 that give nothing yet" in said
    assert "these experts have 25% of the gates' weight" in said
    assert "pass --ffn-hidden-size 13 from now on, without --num-experts" in said
    assert main(command) != 0
    assert "is there already" in capsys.readouterr().err


MISTAKES = [
    ({}, ("--ffn-hidden-size", "4"), "--ffn-hidden-size: 4 cannot be made of 4 experts of 5"),
    ({}, ("--ffn-hidden-size", "21"), "write 5 to 20"),
    ({}, ("--method", "cut"), "--method: 'cut' is no word here; use concatenate, merge, keep"),
    ({}, ("--score", "cut"), "--score: 'cut' is no word here"),
    ({}, ("--scale", "cut"), "--scale: 'cut' is no word here"),
    ({}, ("--domain", "code"), "--domain: 'code' is a class of a profile; name --profile"),
    ({}, ("--shared-gate", "0.5"), "--shared-gate: 0.5 is for a shared expert with a gate"),
    ({"moe_router_pre_softmax": True}, (), "--profile: the gates of a token do not sum to 1"),
    (
        {"moe_router_score_function": "sigmoid", "moe_router_topk": 1}, (),
        "--profile: the gates of a token do not sum to 1",
    ),
    (
        {"moe_router_load_balancing_type": ["sinkhorn"]}, (),
        "--profile: the gates of a token do not sum to 1",
    ),
    ({"moe_latent_size": 3}, (), "experts in a latent space of 3 (--moe-latent-size)"),
    ({"moe_apply_probs_on_input": True}, (), "(--moe-apply-probs-on-input)"),
    ({"num_experts": None}, (), "has no experts; name a mixture"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "options", "message"), MISTAKES)
def test_a_mistake_is_named(tmp_path, capsys, stored, options, message):
    base = write_moe(tmp_path / "moe", **STORED | stored)
    command = ["densify", str(base), "--output", str(tmp_path / "dense")]
    width = () if "--ffn-hidden-size" in options else ("--ffn-hidden-size", "10")
    assert main([*command, *width, *options]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()


def test_a_gated_shared_expert_needs_its_mean(tmp_path, capsys):
    base = write_shared(tmp_path, gated=True)
    command = ["densify", str(base), "--output", str(tmp_path / "d"), "--ffn-hidden-size", "12"]
    assert main(command) != 0
    assert "--shared-gate: a sigmoid of the input scales" in capsys.readouterr().err
    assert main([*command, "--shared-gate", "1.5"]) != 0
    assert "--shared-gate: 1.5 is no mean of a sigmoid" in capsys.readouterr().err


def test_a_profile_of_other_weights_is_told(tmp_path, capsys):
    base = write_moe(tmp_path / "moe", **STORED)
    checkpoint = CheckpointPlace("CKPT", base).open()
    stored = StoredCheckpoint("CKPT", base, checkpoint.folder, 7, "torch_dist", resumes=False)
    ours = joined_checksum((part.name, part.digest()) for part in stored.parts())
    for sha256, told in ((ours, False), ("0" * 64, True), (None, True)):
        path = tmp_path / "p.json"
        counts = np.full((LAYERS, EXPERTS), 4)
        write_profile(path, from_counts(counts, topk=2, checkpoint_sha256=sha256))
        output = tmp_path / f"d{sha256}"
        command = ["densify", str(base), "--output", str(output), "--ffn-hidden-size", "10"]
        assert main([*command, "--profile", str(path)]) == 0
        assert ("was recorded of other weights" in capsys.readouterr().out) is told


def test_a_profile_of_another_model_is_refused(tmp_path, capsys):
    base = write_moe(tmp_path / "moe", **STORED)
    write_profile(tmp_path / "p.json", from_counts(np.full((LAYERS, 6), 4), topk=2))
    command = ["densify", str(base), "--output", str(tmp_path / "d"), "--ffn-hidden-size", "10"]
    assert main([*command, "--profile", str(tmp_path / "p.json")]) != 0
    assert "is of a student with 6 experts, 2 chosen" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    base = write_moe(tmp_path / "moe", **STORED)
    kinds = {"a": 1234, "b": 1234, "c": 5}
    for name, seed in kinds.items():
        densified(base, tmp_path / name, width=WIDTH + 2, seed=seed)
    a, b, c = (dense_tensors(tmp_path / name)["linear_fc1.weight"] for name in kinds)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert json.loads((tmp_path / "a" / "release" / "metadata.json").read_text())
