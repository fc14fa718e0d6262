"""New experts through the real ``pretrain()``: the same function, trained, taken out again."""

import functools
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.new_experts import STORED, card_in
from megatron_moe_inject.host.torch_dist_copy import replaced, rewritten_copy
from tests.harness import lane
from tests.harness.checkpoints import SAVE, changed, whole
from tests.harness.injection import OTHER, PROVEN, inject
from tests.harness.material import student_flags

LOGITS = (str(lane.HARNESS / "logits_gpt.py"),)
STILL = ("--moe-router-load-balancing-type", "none", "--moe-router-bias-update-rate", "0")
DEEPSEEK = (*lane.DEEPSEEK_ROUTER, "--mtp-num-layers", "1", *STILL)
BIAS = "decoder.layers.mlp.router.expert_bias"
CLOSED = -100.0
RECIPE = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{new: all, only_layers: [1, 2, 3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 0.5}}
train: {{router_rows: true}}
steering: {{coeff: 1.0, target_mass: 0.9}}
"""


def opened(folder):
    return CheckpointPlace("CKPT", Path(folder)).open()


@pytest.fixture(scope="module")
def deepseek(material, tmp_path_factory):
    """Sigmoid router with groups, expert bias and a shared expert, and a layer of multi-token
    prediction; saved on two expert-parallel ranks with its optimizer."""
    folder = tmp_path_factory.mktemp("deepseek") / "student"
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "3")
    rate = ("--moe-router-bias-update-rate", "0.05")
    flags = student_flags(*data, *DEEPSEEK, *rate, *SAVE, str(folder), ep=2)
    lane.run(flags, nproc=2)
    assert whole(opened(folder), BIAS).unique().numel() > 1
    return folder


@pytest.fixture(scope="module")
def grown(material, deepseek, tmp_path_factory):
    """A checkpoint with two new experts in each layer, by the options of the command."""

    @functools.cache
    def add(*options, base=deepseek):
        output = tmp_path_factory.mktemp("grown") / "checkpoint"
        arguments = ["add-experts", str(base), "--output", str(output), "--per-layer", "2"]
        assert main([*arguments, *options]) == 0
        return output

    return add


def logits(material, folder, load, *flags, nproc=1, **layout):
    """Logits of fixed tokens, and the losses of a first step on a text."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(torch.randint(61, (4, 32)), folder / "tokens.pt")
    start = ("--load", str(load), "--finetune", "--no-load-optim", "--no-load-rng")
    run = lane.run(
        student_flags(*material.blend, *start, "--train-iters", "1", *flags, **layout),
        nproc=nproc,
        script=LOGITS,
        env={"LOGITS": str(folder)},
    )
    first = run.iterations[0]
    losses = [first[name] for name in ("lm loss", "mtp_1 loss") if name in first]
    return torch.load(folder / "megatron_logits.pt"), losses


@pytest.fixture(scope="module")
def base_logits(material, deepseek, tmp_path_factory):
    return logits(material, tmp_path_factory.mktemp("l") / "base", deepseek, *DEEPSEEK)


@pytest.mark.parametrize("ep", [1, 2])
def test_a_closed_expert_changes_nothing(material, grown, base_logits, tmp_path, ep):
    """Groups, shared experts, multi-token prediction; ids in the second half move."""
    load = grown("--donors", "0,2")
    flags = (*DEEPSEEK, "--num-experts", "6")
    ours, losses = logits(material, tmp_path / "l", load, *flags, nproc=ep, ep=ep)
    torch.testing.assert_close(ours, base_logits[0], rtol=0, atol=1e-6)
    assert losses == pytest.approx(base_logits[1], rel=2e-6)


def test_a_twin_in_the_place_of_its_donor_is_the_donor(material, grown, base_logits, tmp_path):
    """At EP 2, with the donors closed and their copies open, the model is what it was: weights,
    rows and biases of each new expert are where Megatron looks for them."""
    open_twins = grown("--donors", "1,3", "--rows", "donor")
    checkpoint = opened(open_twins)
    bias = whole(checkpoint, BIAS)
    bias[:, [1, 4]] = CLOSED  # old 0, 1, 2, 3 are now 0, 1, 3, 4
    rows = {(n,): functools.partial(torch.clone, row) for n, row in enumerate(bias)}
    changes = {BIAS: replaced(rows)}
    folder = tmp_path / "twins"
    rewritten_copy(checkpoint, folder / checkpoint.folder.name, changes, lambda items, n: items)
    shutil.copy(open_twins / "latest_checkpointed_iteration.txt", folder)
    flags = (*DEEPSEEK, "--num-experts", "6")
    ours, losses = logits(material, tmp_path / "l", folder, *flags, nproc=2, ep=2)
    torch.testing.assert_close(ours, base_logits[0], rtol=0, atol=1e-6)
    assert losses == pytest.approx(base_logits[1], rel=2e-6)


def test_training_goes_on_with_the_optimizer_as_it_was(material, deepseek, grown):
    """The next steps are those of the base, as moments of old experts moved with them."""
    flags = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "6", *DEEPSEEK)
    flags = (*flags, "--override-opt_param-scheduler")
    base, ours = (
        lane.run(student_flags(*flags, "--load", str(load), *more, ep=2), nproc=2)
        for load, more in (
            (deepseek, ()),
            (grown("--donors", "0,2"), ("--num-experts", "6")),
        )
    )
    assert [x["iteration"] for x in ours.iterations] == [4, 5, 6]
    for name in ("lm loss", "grad norm"):
        assert ours.losses(name) == pytest.approx(base.losses(name), rel=2e-5), name


@pytest.fixture(scope="module")
def trained(material, grown, tmp_path_factory):
    """New experts of layers 1 to 3 of the softmax student, with their rows, at EP 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    student = Path(material.student)
    begin = grown("--layers", "1-3", "--domain", "code", "--unmeasured", base=student)
    extra = ("--load", str(begin), "--num-experts", "6", "--train-iters", "24", *SAVE, str(folder))
    extra += ("--micro-batch-size", "4")
    run = inject(material, RECIPE, nproc=2, ep=2, extra=extra)
    return begin, folder, run


def test_they_train_and_nothing_else_does(trained):
    begin, folder, run = trained
    assert PROVEN.search(run.output)
    experts = "decoder.layers.mlp.experts.experts.linear_fc"
    assert "2 new experts in each MoE layer (4-5 of 6)" in run.output
    names = changed(begin, folder)
    assert names == {f"{experts}{n}.weight[{layer}]" for n in (1, 2) for layer in (1, 2, 3)} | {
        "decoder.layers.mlp.router.weight"
    }
    for name in (f"{experts}1.weight", f"{experts}2.weight", "decoder.layers.mlp.router.weight"):
        old, new = (whole(opened(where), name) for where in (begin, folder))
        assert torch.equal(old[:, :4], new[:, :4]), name
        assert torch.equal(old[0], new[0]), name
        assert not torch.equal(old[1:, 4:], new[1:, 4:]), name


def test_domain_tokens_find_them_and_general_ones_do_not(trained):
    _, _, run = trained
    shares = run.losses("target share/code")
    assert shares[0] < 0.2
    assert shares[-1] > 0.6
    assert run.losses("kd loss")[-1] < 0.9 * run.losses("kd loss")[0]


def test_taken_out_the_student_is_the_base_bitwise(material, trained, tmp_path, capsys):
    _, folder, _ = trained
    without = tmp_path / "without"
    assert main(["remove-experts", str(folder), "--output", str(without)]) == 0
    assert "6 -> 4 experts" in capsys.readouterr().out
    assert changed(material.student, without) == set()
    assert opened(without).tensors.keys() == opened(material.student).tensors.keys() - {
        name for name in opened(material.student).tensors if "optimizer" in name
    }
    args = opened(without).args
    assert args.num_experts == 4
    assert not hasattr(args, STORED)


def test_one_file_brings_them_to_the_base(material, trained, tmp_path):
    """Applied to the student as it was before, it is what was trained."""
    _, folder, _ = trained
    delta, applied = tmp_path / "delta", tmp_path / "applied"
    between = ["--base", material.student, "--trained", str(folder)]
    assert main(["export-delta", *between, "--output", str(delta)]) == 0
    words = ["--base", material.student, "--delta", str(delta), "--output", str(applied)]
    assert main(["apply-delta", *words]) == 0
    assert changed(applied, folder) == set()
    assert card_in(opened(applied).args, "here").new == card_in(opened(folder).args, "here").new


def test_a_checkpoint_without_a_card_needs_one_of_its_model(deepseek, grown, tmp_path, capsys):
    load = grown("--donors", "0,2")
    out = tmp_path / "out"
    assert main(["remove-experts", str(deepseek), "--output", str(out)]) == 2
    assert "has no card of new experts; name with --card" in capsys.readouterr().err
    arguments = ["remove-experts", str(deepseek), "--output", str(out), "--card", str(load)]
    assert main(arguments) == 2
    assert "has 4 experts in a layer, and its card says 6" in capsys.readouterr().err
    assert not out.exists()


def test_removed_from_groups_every_expert_is_where_it_was(deepseek, grown, tmp_path, capsys):
    load = grown("--donors", "0,2", "--noise", "0.1")
    without = tmp_path / "without"
    assert main(["remove-experts", str(load), "--output", str(without)]) == 0
    before, after = opened(deepseek), opened(without)
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(whole(before, name), whole(after, name)), name


def test_the_share_from_sampled_logits_is_that_of_a_run(material, tmp_path, capsys):
    """Of the first layer, whose input is the same; and the bound is kept."""
    recipe = RECIPE.replace("new: all, only_layers: [1, 2, 3]", "layers: {{0: [1]}}")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.format(teacher=material.teacher))
    ours = ("--skip-train", "--eval-iters", "3", "--inject-recipe", str(path))

    def profiled(name, load, *more):
        file = tmp_path / name
        flags = student_flags(*material.blend, "--load", str(load), *ours, *more)
        lane.run([*flags, "--inject-profile", str(file)])
        return file

    before = profiled("before.json", material.student, "--inject-profile-logits", "2048")
    out = tmp_path / "grown"
    arguments = ["add-experts", material.student, "--output", str(out), "--per-layer", "2"]
    arguments += ["--profile", str(before), "--domain", "code"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "--most-chosen: new experts would get" in message
    assert not out.exists()
    assert main([*arguments, "--most-chosen", "0.9"]) == 0
    # The profile's checksum of what was loaded is that of the file that was copied.
    assert "recorded of other weights" not in capsys.readouterr().out
    from megatron_moe_inject.experts.grow.add import Addition, Asked
    from megatron_moe_inject.experts.grow.bounds import chosen_share

    asked = Asked(per_layer=2, profile=str(before), domains=["code"])
    shares = chosen_share(Addition(CheckpointPlace("CKPT", Path(material.student)), asked))
    after = read_profile(profiled("after.json", out, "--num-experts", "6"))
    for name, by_layer in shares.items():
        statistics = after.classes[name]
        tokens = statistics.selections[0]
        assert by_layer[0] == pytest.approx(tokens[4:].sum() / tokens.sum(), abs=0.03), name


HYBRID = ("--hybrid-layer-pattern", "*E*-*E")


def test_a_hybrid_model_in_bf16_with_its_sharded_optimizer(material, tmp_path, capsys):
    """At EP 2; one block of three has no experts, and one that has gets them to fill it up. Its
    next steps are those of the base."""
    general = ("--data-path", material.general, "--split", "90,5,5")
    own = (*HYBRID, "--bf16", *lane.DISTRIBUTED_OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")
    own = [*own, *DEEPSEEK[: DEEPSEEK.index("--mtp-num-layers")], *STILL]

    def run(*flags):
        flags = student_flags(*general, *own, *flags, ep=2)
        at = flags.index("--num-layers")
        return lane.run([*flags[:at], *flags[at + 2 :]], nproc=2)

    base, load = tmp_path / "base", tmp_path / "grown"
    run("--train-iters", "3", *SAVE, str(base))
    arguments = ["add-experts", str(base), "--output", str(load), "--per-layer", "2"]
    assert main([*arguments, "--layers", "5", "--donors", "0,2"]) == 0
    out = capsys.readouterr().out
    assert "layers 1 got as many" in out
    assert "optimizer" not in out
    names = opened(load).metadata.state_dict_metadata
    experts = "decoder.layers.5.mlp.experts.experts.linear_fc1.weight"
    states = {name: tuple(names[name].size) for name in names if name.endswith(experts)}
    assert len(states) == 4
    assert set(states.values()) == {(6, 128, 32)}
    on = ("--train-iters", "5", "--override-opt_param-scheduler", "--load")
    before, after = (run(*on, str(base)), run(*on, str(load), "--num-experts", "6"))
    assert [x["iteration"] for x in after.iterations] == [4, 5]
    assert after.losses("lm loss") == pytest.approx(before.losses("lm loss"), rel=1e-5)
    assert after.losses("grad norm") == pytest.approx(before.losses("grad norm"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER is not set")
def test_the_other_megatron_has_its_own_grown(material, tmp_path):
    """Saved, grown, loaded at EP 2, trained and taken out again."""
    base, load, after, without = (tmp_path / name for name in ("base", "grown", "after", "without"))
    data = ("--data-path", material.general, "--split", "90,5,5", *DEEPSEEK)
    flags = student_flags(*data, "--train-iters", "3", *SAVE, str(base))
    lane.run(flags, pythonpath=[OTHER])
    arguments = ["add-experts", str(base), "--output", str(load), "--per-layer", "2"]
    assert main([*arguments, "--donors", "0,2"]) == 0
    start = ("--finetune", "--no-load-optim", "--no-load-rng", "--train-iters", "1")
    runs = [
        lane.run(student_flags(*data, *start, *more, ep=ep), nproc=ep, pythonpath=[OTHER])
        for more, ep in (
            (("--load", str(base)), 1),
            (("--load", str(load), "--num-experts", "6", *SAVE, str(after)), 2),
        )
    ]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=2e-6)
    arguments = ["remove-experts", str(after), "--output", str(without), "--card", str(load)]
    assert main(arguments) == 0
    assert opened(without).args.num_experts == 4


def test_a_door_that_stays_closed_is_in_the_plan_and_a_wrong_number_ends_it(material, grown):
    load = ("--load", str(grown("--donors", "0,2")), "--inject-dry-run", *DEEPSEEK)
    run = inject(material, RECIPE, extra=(*load, "--num-experts", "6"))
    assert "no token reaches one until that opens" in run.output
    run = inject(material, RECIPE, extra=load, check=False)
    assert run.returncode == 2
    assert "--num-experts: 4 is not what" in run.output
    assert "has: 6, of which 2, 5 were added; pass --num-experts 6" in run.output


@pytest.mark.slow
def test_the_update_of_the_bias_opens_the_door(material, grown):
    """Megatron's own raises the bias of whoever gets no token, here by 0.05 a step."""
    load = ("--load", str(grown("--donors", "0,2")), "--num-experts", "6", *DEEPSEEK)
    rate = ("--moe-router-bias-update-rate", "0.05", "--train-iters", "20")
    recipe = RECIPE.replace("router_rows", "router").replace("[1, 2, 3]", "[]")
    shares = inject(material, recipe, extra=(*load, *rate)).losses("target share/code")
    assert shares[0] == 0
    assert shares[-1] > 0.1


@pytest.mark.slow
def test_both_models_are_measured_on_the_same_text(material, tmp_path, capsys):
    """As the flags of a training command at EP 2 say it, on one process."""
    words = ["add-experts", material.student, "--output", str(tmp_path / "grown"), "--check"]
    words += ["--per-layer", "2", "--donors", "0,2"]
    flags = student_flags(*material.blend, "--eval-iters", "1", ep=2)
    assert main([*words, "--", *flags]) == 2
    error = capsys.readouterr().err
    assert "--most-chosen: new experts would get 1" in error
    assert not (tmp_path / "grown").exists()
    assert main([*words, "--most-chosen", "0.3", "--most-loss", "0.1", "--", *flags]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("loss of ")]
    assert len(lines) == 2
    for line in lines:
        before, after = map(float, re.findall(r"(\d\.\d{6}) ", line))
        assert 0 < abs(after - before) < 0.1
    assert "of the choices of text, at most" in out
