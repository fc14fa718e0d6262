"""New experts in every form of a checkpoint, and out again; what cannot be is one line."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.experts.delta.delta import apply_delta, export_delta
from megatron_moe_inject.experts.grow import starts
from megatron_moe_inject.experts.grow.add import Asked, add_experts
from megatron_moe_inject.experts.grow.remove import remove_experts
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.new_experts import STORED, NewExperts, card_in
from megatron_moe_inject.host.torch_dist_copy import replaced, rewritten_copy
from tests.harness.checkpoints import whole
from tests.harness.profiles import from_counts
from tests.harness.stored_adapters import entry, write_adapters
from tests.harness.stored_moe import EXPERTS, FORMS, LAYERS, STATES, read, write_moe

FC1, FC2 = (f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
ROWS = "mlp.router.weight"
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
SIGMOID = {"moe_router_score_function": "sigmoid", "bias": "expert_bias"}


def silent(items, total):
    return items


def place(path):
    return CheckpointPlace("CKPT", path)


def add(base, output, **asked):
    asked = Asked(**{"per_layer": 2, **asked})
    return add_experts(place(base), output, asked, progress=silent)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_copies_stand_where_they_belong(tmp_path, form, groups):
    base = write_moe(tmp_path / "base", form, states=True, **GROUPS if groups == 2 else {})
    added = add(base, tmp_path / "grown", donors="1,2", rows="donor")
    old, new = place(base).open(), place(tmp_path / "grown").open().with_training_state()
    old = old.with_training_state()
    # By id now the old one whose values are there.
    order = [0, 1, 1, 2, 3, 2] if groups == 2 else [0, 1, 2, 3, 1, 2]
    fresh = [2, 5] if groups == 2 else [4, 5]
    assert added.card.ids() == fresh
    for name in (FC1, FC2, ROWS):
        assert torch.equal(read(new, form, name), read(old, form, name)[:, order]), name
        for state in STATES:
            prefix = f"optimizer.state.{state}."
            values = read(old, form, name, prefix)[:, order]
            if state in starts.ZERO_STATES:
                values[:, fresh] = 0
            assert torch.equal(read(new, form, name, prefix), values), (name, state)
    same = "self_attention.linear_proj.weight"
    assert torch.equal(read(new, form, same), read(old, form, same))
    assert torch.equal(whole(new, "output_layer.weight"), whole(old, "output_layer.weight"))
    assert added.parameters == sum(read(new, form, n)[:, fresh].numel() for n in (FC1, FC2, ROWS))


@pytest.mark.parametrize("form", FORMS)
def test_objects_of_experts_are_there_for_every_id(tmp_path, form):
    base = write_moe(tmp_path / "base", form, **GROUPS)
    add(base, tmp_path / "grown", donors="1,2")
    names = place(tmp_path / "grown").open().metadata.state_dict_metadata
    objects = {name for name in names if ".experts." in name and "_extra_state" in name}
    numbers = {"stacked": rf"/shard_\d\.(\d)_{LAYERS}\.6$", "by_layer": r"/shard_(\d)_6$",
               "named": rf"experts\.(\d)\.linear_fc1\._extra_state/shard_\d_{LAYERS}$"}  # fmt: skip
    pattern = numbers["stacked" if form == "joined" else form]
    assert len(objects) == 6 * LAYERS
    ids = [re.search(pattern, name) for name in objects]
    assert sorted(int(match[1]) for match in ids) == sorted([*range(6)] * LAYERS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", starts.WEIGHTS)
def test_taken_out_everything_is_bitwise_what_it_was(tmp_path, form, weights):
    base = write_moe(tmp_path / "base", form, **GROUPS, **SIGMOID)
    donors = "0,3" if weights == "copy" else None
    add(base, tmp_path / "grown", donors=donors, weights=weights, noise=0.1)
    remove_experts(place(tmp_path / "grown"), tmp_path / "without", progress=silent)
    old, new = place(base).open(), place(tmp_path / "without").open()
    assert old.metadata.state_dict_metadata.keys() == new.metadata.state_dict_metadata.keys()
    for name in old.tensors:
        assert torch.equal(whole(old, name), whole(new, name)), name
    assert vars(old.args) == vars(new.args)
    assert old.common.keys() == new.common.keys()


def test_the_mean_begins_with_noise_so_that_no_two_are_the_same(tmp_path):
    base = write_moe(tmp_path / "base")
    card = add(base, tmp_path / "grown").card
    old, new = (read(place(f).open(), "stacked", FC1) for f in (base, tmp_path / "grown"))
    assert (card.weights, card.rows, card.noise) == ("mean", "mean", 0.01)
    mean = old.mean(1)
    spread = (new[:, 4] - mean).std() / mean.std()
    assert 0.005 < spread < 0.02
    assert not torch.equal(new[:, 4], new[:, 5])
    rows = [read(place(f).open(), "stacked", ROWS) for f in (base, tmp_path / "grown")]
    torch.testing.assert_close(rows[1][:, 4], rows[0].mean(1))
    assert torch.equal(rows[1][:, 4], rows[1][:, 5])


def test_random_weights_begin_as_megatrons_do(tmp_path):
    base = write_moe(tmp_path / "base")
    add(base, tmp_path / "grown", per_layer=8, weights="random")
    new = place(tmp_path / "grown").open()
    first, second = (read(new, "stacked", name)[:, EXPERTS:].std() for name in (FC1, FC2))
    assert first == pytest.approx(0.02, rel=0.1)
    assert second == pytest.approx(0.02 / (2 * LAYERS) ** 0.5, rel=0.1)


def test_noise_is_the_same_in_the_model_and_its_main_parameters(tmp_path):
    base = write_moe(tmp_path / "base", states=True, dtype=torch.bfloat16)
    for folder in ("grown", "again"):
        add(base, tmp_path / folder, donors="1,2", noise=0.05)
    new, again = (place(tmp_path / f).open().with_training_state() for f in ("grown", "again"))
    for name in (FC1, FC2):
        model = read(new, "stacked", name)
        main = read(new, "stacked", name, "optimizer.state.fp32_param.")
        assert model.dtype == torch.bfloat16
        assert torch.equal(model, main.bfloat16()), name
        assert not torch.equal(main[:, 4], main[:, 1]), name
        assert torch.equal(model, read(again, "stacked", name)), name


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_a_closed_expert_is_below_every_old_one(tmp_path, score):
    base = write_moe(tmp_path / "base", **GROUPS, **SIGMOID | {"moe_router_score_function": score})
    added = add(base, tmp_path / "grown", donors="0,2")
    assert added.exact
    old, new = (
        read(place(f).open(), "stacked", "mlp.router.expert_bias")
        for f in (base, tmp_path / "grown")
    )
    assert new.dtype == torch.float32
    assert torch.equal(new[:, [0, 1, 3, 4]], old)
    most = 1.0 if score == "sigmoid" else 1000.0
    assert (new[:, [2, 5]].amax(1) + most < old.amin(1)).all()
    rows = [read(place(f).open(), "stacked", ROWS) for f in (base, tmp_path / "grown")]
    assert torch.equal(rows[1][:, [2, 5]], rows[0][:, [0, 2]]), "the donor's row waits"


def test_other_layers_are_filled_and_closed(tmp_path):
    base = write_moe(tmp_path / "base", **SIGMOID)
    card = add(base, tmp_path / "grown", layers=[1], donors="0,2", rows="donor").card
    assert (card.new, card.filled, card.donors) == ({1: [4, 5]}, [0, 2], {1: [0, 2]})
    bias = read(place(tmp_path / "grown").open(), "stacked", "mlp.router.expert_bias")
    old = read(place(base).open(), "stacked", "mlp.router.expert_bias")
    assert torch.equal(bias[1, 4:], old[1, [0, 2]])
    for layer in (0, 2):
        assert (bias[layer, 4:] < old[layer].min() - 1).all()


def test_arguments_say_what_is_there(tmp_path):
    base = write_moe(tmp_path / "base", moe_expert_capacity_factor=1.5, inject_policy={}, **GROUPS)
    added = add(base, tmp_path / "grown", domains=["code", "law"], per_layer=4)
    args = place(tmp_path / "grown").open().args
    assert args.num_experts == 8
    assert args.moe_expert_capacity_factor == 3.0
    assert not hasattr(args, "inject_policy")
    card = card_in(args, "here")
    assert isinstance(card, NewExperts)
    assert card == added.card
    assert card.domains == {"code": [2, 6], "law": [3, 7]}
    assert card.moved == [0, 1, 4, 5]
    assert vars(args)[STORED] == card.plain()
    remarks = " ".join(added.remarks)
    assert "--moe-expert-capacity-factor 3 gives each expert" in remarks
    assert "belongs to an injection, which ends here" in remarks


def test_an_optimizer_that_is_not_stored_by_parameter_is_left_out(tmp_path):
    from megatron_moe_inject.host.torch_dist_write import CheckpointWriter

    base = write_moe(tmp_path / "base", states=True)
    other = tmp_path / "other"
    old = place(base).open().with_training_state()
    with CheckpointWriter(other / "iter_0000007") as writer:
        for name in old.tensors:
            stored = name.replace("optimizer.state.exp_avg.", "optimizer.distributed.bucket_0.")
            writer.tensor([stored], tuple(old.tensors[name].size), (), whole(old, name))
        writer.finish(old.common)
    (other / "latest_checkpointed_iteration.txt").write_text("7")
    added = add(other, tmp_path / "grown", donors="0,2")
    assert "the optimizer's state is not stored by parameter" in added.remarks[0]
    names = place(tmp_path / "grown").open().metadata.state_dict_metadata
    assert not [name for name in names if name.startswith("optimizer")]


def test_stopped_half_way_nothing_is_left(tmp_path):
    base = write_moe(tmp_path / "base")

    def stop(items, total):
        yield from list(items)[:9]
        raise KeyboardInterrupt

    asked = Asked(per_layer=2, donors="0,2")
    with pytest.raises(KeyboardInterrupt):
        add_experts(place(base), tmp_path / "grown", asked, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def _killed(work, calls):
    """A process that is killed at the so-manieth function that its work calls."""
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    work()
    sys.setprofile(None)


def _works(tmp_path):
    """What writes checkpoints: adds, takes out, applies a delta that adds."""
    base, grown, delta = (tmp_path / name for name in ("base", "grown", "delta"))
    write_moe(base, **GROUPS)
    add(base, grown, donors="0,2", noise=0.1)
    export_delta(place(base), place(grown), delta)
    output = tmp_path / "output"
    return output, {
        "add": lambda: add(base, output, donors="0,2"),
        "remove": lambda: remove_experts(place(grown), output, progress=silent),
        "apply": lambda: apply_delta(place(base), delta, output),
    }


@pytest.mark.parametrize("name", ["add", "remove", "apply"])
def test_killed_at_random_moments_nothing_looks_whole_and_the_next_one_tidies_up(tmp_path, name):
    """``output`` is there whole or not at all; what else is left has no tracker file."""
    output, works = _works(tmp_path)
    there, work = set(tmp_path.iterdir()), works[name]
    work()
    whole_names = {path.relative_to(output): path.stat().st_size for path in output.rglob("*")}
    shutil.rmtree(output)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    work()
    sys.setprofile(None)
    shutil.rmtree(output)
    fork, moments = multiprocessing.get_context("fork"), random.Random(3)
    outcomes = set()
    for moment in [*(moments.randrange(calls) for _ in range(14)), calls - 5]:
        process = fork.Process(target=_killed, args=(work, 1 + moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = set(tmp_path.iterdir()) - there - {output}
        assert all(path.name.startswith(".output.") for path in left)
        outcomes.add(output.exists())
        if output.exists():
            found = {p.relative_to(output): p.stat().st_size for p in output.rglob("*")}
            assert found == whole_names
            shutil.rmtree(output)
    assert False in outcomes
    work()
    assert set(tmp_path.iterdir()) == there | {output}


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_added_and_taken_out_again_leaves_the_base(tmp_path, seed):
    """Random numbers of experts, groups, layers, ranks, forms and starts."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 3])
    experts, layers = groups * draw.randint(2, 4), draw.randint(1, 4)
    bias = draw.choice([None, "bias", "expert_bias"]) if groups == 1 else "expert_bias"
    more = GROUPS | {"moe_router_num_groups": groups} if groups > 1 else {}
    score = {"moe_router_score_function": "sigmoid"} if bias == "expert_bias" else {}
    form = draw.choice(FORMS)
    sizes = {"experts": experts, "layers": layers}
    sizes["states"], sizes["dtype"] = draw.random() < 0.5, draw.choice([torch.float32, torch.half])
    base = write_moe(tmp_path / "base", form, bias=bias, **sizes, **more, **score)
    ep = draw.choice([n for n in (1, 2, 3) if experts % n == 0])
    per_layer = groups * draw.randint(1, 3)
    while (experts + per_layer) % ep:
        per_layer += groups
    chosen = sorted(draw.sample(range(layers), draw.randint(1, layers)))
    donors = [draw.randrange(experts) for _ in range(per_layer)]
    asked = Asked(
        per_layer=per_layer, layers=chosen, ep=ep, seed=seed,
        donors=draw.choice([None, ",".join(map(str, donors))]),
        noise=draw.choice([None, 0.2]), optimizer=draw.random() < 0.5,
    )  # fmt: skip
    card = add_experts(place(base), tmp_path / "grown", asked, progress=silent).card
    assert sorted([*card.ids(), *card.moved]) == list(range(experts + per_layer))
    assert (sorted(card.new), len(card.filled)) == (chosen, layers - len(chosen))
    size = (experts + per_layer) // groups
    assert [sum(e // size == g for e in card.ids()) for g in range(groups)] == (
        [per_layer // groups] * groups
    )
    grown = place(tmp_path / "grown").open()
    for name in (FC1, FC2, ROWS):
        values = [read(c, form, name) for c in (place(base).open(), grown)]
        assert torch.equal(values[0], values[1][:, card.moved]), name
    export_delta(place(base), place(tmp_path / "grown"), tmp_path / "delta")
    apply_delta(place(base), tmp_path / "delta", tmp_path / "applied")
    for number, folder in enumerate(("grown", "applied")):
        without = tmp_path / f"without{number}"
        remove_experts(place(tmp_path / folder), without, progress=silent)
        old, new = place(base).open(), place(without).open()
        assert old.tensors.keys() == new.tensors.keys()
        for name in old.tensors:
            assert torch.equal(whole(old, name), whole(new, name)), name
        assert vars(old.args) == vars(new.args)


MISTAKES = {
    "0": ("--per-layer 0", "--per-layer: 0 is below 1; use one of 1, 2, 3"),
    "groups": ("--per-layer 3", "3 cannot be shared evenly by 2 groups; use one of 2, 4",
               GROUPS),
    "ep": ("--per-layer 2 --ep 4", "makes 6 experts, which 4 expert-parallel ranks cannot share; "
           "use one of 4, 8, 12"),
    "both": ("--per-layer 3 --ep 8", "use one of 4, 12, 20", GROUPS),
    "layout": ("--per-layer 1", "which 2 expert-parallel ranks cannot share",
               {"expert_model_parallel_size": 2}),
    "domains": ("--per-layer 3 --domain a --domain b", "shared evenly by 2 domains"),
    "layers": ("--per-layer 2 --layers 1-9", "--layers: 3 has no experts; layers with: 0-2"),
    "list": ("--per-layer 2 --layers a", "is no list of layers"),
    "donors": ("--per-layer 2 --donors 1", "is not one for each of 2 new experts"),
    "unknown donor": ("--per-layer 2 --donors 1,9", "name 2 of 0 to 3"),
    "copy": ("--per-layer 2 --weights copy", "--weights: 'copy' needs experts to copy from"),
    "rows": ("--per-layer 2 --rows donor", "--rows: 'donor' needs experts to copy from"),
    "closed": ("--per-layer 2 --rows closed", "needs routers with a bias"),
    "same": ("--per-layer 2 --donors 1,1 --noise 0", "leaves new experts of a layer the same"),
    "noise": ("--per-layer 2 --noise -1", "--noise: -1.0 is negative"),
    "noise, nan": ("--per-layer 2 --noise nan", "--noise: nan is not finite"),
    "pre-softmax": ("--per-layer 2 --donors 1,2 --rows donor",
                    "take the softmax over all experts before they choose",
                    {"moe_router_pre_softmax": True}),
    "expert bias": ("--per-layer 2", "even where it is not chosen; add --check",
                    {"moe_router_pre_softmax": True, "bias": "expert_bias"}),
    "unmeasured": ("--per-layer 2", "was not measured; add --profile FILE that was recorded with "
                   "--logits N, or --check -- <flags of the training command>, or --unmeasured"),
    "open": ("--per-layer 2 --rows mean", "was not measured", {"bias": "bias"}),
    "twice": ("--per-layer 2 --check --unmeasured", "--unmeasured: --check measures it"),
    "weights": ("--per-layer 2 --weights mine", "use copy, mean, random or teacher:SOURCE"),
    "source": ("--per-layer 2 --weights teacher:x", "write teacher:megatron:/dir or teacher:hf:"),
    "no teacher": ("--per-layer 2 --weights teacher:megatron:/none", "--weights /none is no dir"),
    "no folder": ("--per-layer 2 --weights teacher:hf:/none", "--weights: '/none' is no dir"),
    "no use": ("--per-layer 2 --teacher-layers 1,2,3", "--teacher-layers: goes with --weights"),
    "not numbers": ("--per-layer 2 --teacher-layers a", "'a' is no list of numbers"),
    "sinkhorn": ("--per-layer 2", "'sinkhorn' of the checkpoint deals tokens out",
                 {"moe_router_load_balancing_type": ["sinkhorn"]}),
    "forced": ("--per-layer 2", "--moe-router-force-load-balancing: of the checkpoint",
               {"moe_router_force_load_balancing": True}),
    "devices": ("--per-layer 2", "--moe-router-topk-limited-devices",
                {"moe_router_topk_limited_devices": 2}),
    "dense": ("--per-layer 2", "is a dense model", {"num_experts": None}),
    "other": ("--per-layer 2", "and --num-experts 5 in its arguments", {"num_experts": 5}),
    "bound": ("--per-layer 2 --most-chosen 3", "--most-chosen: 3.0 is not between 0 and 1"),
    "flags": ("--per-layer 2 -- --seq-length 32", "training flags are for --check; add it"),
    "step": ("--per-layer 2 --check -- --ckpt-step 3", "--check: --ckpt-step does not go with it"),
    "check": ("--per-layer 2 --check", "--check: needs the flags of the training command"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, case):
    words, message, *changed = MISTAKES[case]
    base = write_moe(tmp_path / "base", **(changed[0] if changed else {}))
    out = tmp_path / "out"
    assert main(["add-experts", str(base), "--output", str(out), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_routers_that_weigh_all_experts_are_written_when_that_is_said(tmp_path, capsys):
    base = write_moe(tmp_path / "base", moe_router_pre_softmax=True)
    words = ["add-experts", str(base), "--output", str(tmp_path / "out"), "--per-layer", "2"]
    assert main([*words, "--unmeasured"]) == 0
    out = capsys.readouterr().out
    assert "by how much the model's function moves was not measured" in out
    assert "no token can choose" not in out


def test_a_linear_bias_closes_experts_before_a_softmax_over_all(tmp_path):
    base = write_moe(tmp_path / "base", bias="bias", moe_router_pre_softmax=True)
    assert add(base, tmp_path / "grown", donors="0,2").exact
    new = place(tmp_path / "grown").open()
    assert (read(new, "stacked", "mlp.router.bias")[:, 4:] == starts.FAR).all()


def test_experts_are_added_once(tmp_path, capsys):
    base = write_moe(tmp_path / "base")
    add(base, tmp_path / "grown")
    words = ["add-experts", str(tmp_path / "grown"), "--output", str(tmp_path / "more")]
    assert main([*words, "--per-layer", "2"]) == 2
    assert "has new experts already (4-5 of 6); take them out" in capsys.readouterr().err


def test_adapters_are_merged_first(tmp_path, capsys):
    """Which expert they are of stands in their names."""
    base, adapted = write_moe(tmp_path / "base"), tmp_path / "adapted"
    site = (next(n for n in place(base).open().tensors if n.endswith("router.weight")), (0,))
    write_adapters(base, adapted, {site: [0]}, [entry(1, 1.0)])
    for command in (["add-experts", "--per-layer", "2"], ["remove-experts"]):
        there = [command[0], str(adapted), *command[1:], "--output", str(tmp_path / "out")]
        assert main(there) == 2
        assert "moe-inject merge-adapters" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_names_that_nobody_knows_are_refused(tmp_path, capsys):
    from megatron_moe_inject.host.torch_dist_write import CheckpointWriter

    base = write_moe(tmp_path / "base")
    old, other = place(base).open(), tmp_path / "other"
    with CheckpointWriter(other / "iter_0000007") as writer:
        for name in old.tensors:
            writer.tensor([name], tuple(old.tensors[name].size), (), whole(old, name))
        writer.tensor(["decoder.layers.mlp.experts.weight1"], (2,), (), torch.zeros(2))
        writer.finish(old.common)
    (other / "latest_checkpointed_iteration.txt").write_text("7")
    out = tmp_path / "out"
    words = ["add-experts", str(other), "--output", str(out), "--per-layer", "2", "--unmeasured"]
    assert main(words) == 2
    assert "holds decoder.layers.mlp.experts.weight1, which belong to" in capsys.readouterr().err
    assert not out.exists()


def test_donors_are_the_most_used_of_their_group(tmp_path):
    """Domains take turns in each group; what is used most overall is not what counts."""
    counts = [[20, 12, 4, 4], [6, 10, 20, 4], [12, 8, 8, 12]]
    general = [[4, 4, 12, 20], [4, 20, 12, 4], [10, 10, 10, 10]]
    file = str(tmp_path / "p.json")
    profile = from_counts(counts, topk=2, general=general)
    law = {"law": profile.classes["general"]}
    write_profile(file, replace(profile, classes={**profile.classes, **law}))
    base = write_moe(tmp_path / "base", **GROUPS)
    added = add(base, tmp_path / "grown", per_layer=4, domains=["code", "law"], profile=file)
    assert added.card.donors == {0: [0, 0, 2, 3], 1: [1, 1, 2, 2], 2: [0, 0, 3, 2]}
    assert added.card.domains == {"code": [2, 6], "law": [3, 7]}
    assert added.card.noise == 0.01, "0 and 1 are donors of two"
    assert "was recorded of other weights (an unknow" in added.remarks[0]
    card = add(base, tmp_path / "contrast", profile=file, domains=["code"], score="contrast").card
    assert card.donors == {0: [0, 2], 1: [0, 2], 2: [0, 3]}


def test_a_profile_of_another_model_is_refused(tmp_path):
    file = str(tmp_path / "p.json")
    write_profile(file, from_counts([[4] * 8] * 3, topk=2))
    base = write_moe(tmp_path / "base")
    with pytest.raises(RecipeError, match="with 8 experts, 2 chosen"):
        add(base, tmp_path / "grown", profile=file, domains=["code"])


def test_a_delta_of_the_base_says_why_it_does_not_apply(tmp_path, capsys):
    base, trained = write_moe(tmp_path / "base"), tmp_path / "trained"
    old = place(base).open()
    name = "output_layer.weight"
    changes = {name: replaced({(): lambda: whole(old, name) + 1})}
    rewritten_copy(old, trained / "iter_0000007", changes, silent)
    shutil.copy(base / "latest_checkpointed_iteration.txt", trained)
    delta, grown = tmp_path / "delta", tmp_path / "grown"
    words = ["--base", str(base), "--trained", str(trained), "--output", str(delta)]
    assert main(["export-delta", *words]) == 0
    add(base, grown)
    words = ["--base", str(grown), "--delta", str(delta), "--output", str(tmp_path / "out")]
    assert main(["apply-delta", *words]) == 2
    error = capsys.readouterr().err
    assert "has new experts (4-5 of 6), which the delta's base has not; apply it to" in error
    assert str(base) in error


def test_what_has_several_names_is_copied_once(tmp_path):
    base = write_moe(tmp_path / "base")
    took = add(base, tmp_path / "grown", donors="0,1", rows="donor").copy
    old = place(base).open()
    parts = old.metadata.storage_data
    kept = {(info.relative_path, info.offset): info.length for part, info in parts.items()
            if "router" not in part.fqn and "common" not in part.fqn}  # fmt: skip
    assert took.copied == sum(kept.values())
    objects = [part for part in parts if part.offset is None]
    assert len(objects) > len({parts[part].offset for part in objects})
