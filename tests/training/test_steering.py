"""Steering through the real ``pretrain()``: what it does to routing.

Experts 0 and 3 of layer 2, and one each of layers 1 and 3, are the targets of the domain "code".
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness import lane
from tests.harness.checkpoints import whole
from tests.harness.injection import OTHER, PROVEN, inject, recipe_file
from tests.harness.material import make_material, student_flags
from tests.harness.training_recipes import STEERED

ROWS = STEERED.replace("router: true", "router_rows: true")
FROZEN = STEERED.replace("{{router: true}}", "{{}}").replace("retention: 1.0", "retention: 0.0")
TERMS = (
    "lm loss",
    "kd loss",
    "total loss",
    "steering loss",
    "target balance loss",
    "router retention",
    "target share/code",
    "target gates/code",
    "target mass/code",
    "general on targets/code",
    "grad norm",
)


@pytest.fixture(scope="module")
def single(material):
    return inject(material, STEERED)


@pytest.mark.parametrize("kind", ["label", pytest.param("top", marks=pytest.mark.slow)])
def test_the_teachers_confidence_weighs_what_is_steered_and_not_what_is_seen(
    material, single, kind
):
    sure = STEERED.replace("balance: 0.1", f"balance: 0.1, confidence: {kind}")
    one = inject(material, sure)
    assert one.losses("steering loss")[0] != single.losses("steering loss")[0]
    assert one.losses("target mass/code")[0] == single.losses("target mass/code")[0]
    if kind == "top":
        for layout in (dict(ep=2), dict(cp=2)):
            run = inject(material, sure, nproc=2, **layout)
            for term in TERMS:
                expected = pytest.approx(one.losses(term), rel=2e-5, abs=1e-6)
                assert run.losses(term) == expected, (layout, term)


def test_retention_is_zero_at_the_first_step_and_then_grows(single):
    values = single.losses("router retention")
    assert abs(values[0]) < 1e-7
    assert min(values[1:]) > 1e-4


MORE = ("--train-iters", "30", "--moe-router-load-balancing-type", "none", *lane.ONE_BATCH)
ONLY = STEERED.replace("retention: 1.0", "retention: 0.0").replace("0.5, target", "3.0, target")


@pytest.fixture(scope="module")
def pushed(material):
    return inject(material, ONLY.replace("target_mass: 0.8", "target_mass: 0.6"), extra=MORE)


def test_it_raises_the_share_until_the_target_mass_and_stops(material, pushed):
    """Mass goes to the target for every token and no further; choices follow."""
    mass = pushed.losses("target mass/code")
    assert mass[0] < 0.4
    assert 0.58 < mass[-1] < 0.8
    assert pushed.losses("steering loss")[-1] < 0.5 * pushed.losses("steering loss")[0]
    share = pushed.losses("target share/code")
    assert share[-1] > share[0] + 0.15
    left = inject(material, ONLY.replace("coeff: 3.0", "coeff: 0.0, report: true"), extra=MORE)
    assert abs(left.losses("target mass/code")[-1] - left.losses("target mass/code")[0]) < 0.1
    assert left.losses("target share/code")[0] == pytest.approx(share[0], rel=1e-6)


def test_router_retention_bounds_what_happens_to_general_tokens(material):
    """The same run with a vanishing weight goes away from the original further."""
    held, watched = (
        inject(material, ONLY.replace("retention: 0.0", f"retention: {weight}"), extra=MORE)
        for weight in ("10.0", "1.0e-9")
    )
    moved = [run.losses("router retention")[-1] for run in (held, watched)]
    assert moved[0] < 0.3 * moved[1]
    assert moved[1] > 0.01


def test_a_frozen_router_stays_bitwise_and_hidden_states_are_steered(material):
    """Layers 2 and 3 get their input from trained experts below; layer 1 gets nothing."""
    run = inject(material, FROZEN)
    off = inject(material, FROZEN.replace("coeff: 0.5", "coeff: 0.0, report: true"))
    assert PROVEN.search(run.output)
    assert "steering acts on nothing in layers [1]" in run.output
    assert run.losses("steering loss")[0] > 0
    assert run.losses("grad norm")[0] != off.losses("grad norm")[0]


def test_steering_that_would_act_on_nothing_is_an_error(material):
    recipe = FROZEN.replace("{{1: [2], 2: [0, 3], 3: [3]}}", "{{3: [3]}}")
    run = inject(material, recipe, nproc=2, pp=2, check=False)
    assert run.returncode == 2, run.tail()
    assert "steering.coeff: 0.5 steers layers [3], but neither their routers train" in run.output


@pytest.mark.parametrize(
    "optimizer",
    [
        (),
        pytest.param(
            ("--bf16", *lane.DISTRIBUTED_OPTIMIZER),
            id="bf16, distributed optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_target_rows_are_in_the_stock_matrix_of_a_checkpoint_and_resume(
    material, tmp_path, optimizer
):
    """The other rows keep their bits; plain Megatron loads it; a resumed run goes on bitwise."""
    save = tmp_path / "saved"
    keep = (*optimizer, "--train-iters", "6", "--save", str(save), "--save-interval", "3")
    whole = inject(material, ROWS, nproc=2, ep=2, extra=(*optimizer, "--train-iters", "6"))
    inject(material, ROWS, nproc=2, ep=2, extra=(*keep, "--exit-interval", "3"))
    before, after = (_stored_routers(folder) for folder in (material.student, save))
    before = before.to(after.dtype)
    for layer, rows in {0: [], 1: [2], 2: [0, 3], 3: [3]}.items():
        same = [torch.equal(a, b) for a, b in zip(before[layer], after[layer], strict=True)]
        assert [row for row, kept in enumerate(same) if not kept] == rows
    plain = (*material.blend, "--train-iters", "4", "--no-load-optim", *optimizer)
    assert lane.run(student_flags(*plain, "--load", str(save))).iterations
    ours = ("--inject-recipe", recipe_file(material, ROWS), "--load", str(save))
    resumed = lane.run(student_flags(*material.blend, *keep, *ours, ep=2), nproc=2)
    for term in TERMS:
        assert resumed.losses(term) == whole.losses(term)[3:], term


def _stored_routers(folder):
    """Router matrices ``[L, E, h]`` of a checkpoint."""
    checkpoint = CheckpointPlace("--load", Path(folder)).open()
    return whole(checkpoint, "decoder.layers.mlp.router.weight")


def test_a_delta_holds_the_rows_and_applies(material, tmp_path):
    save, delta, applied = (tmp_path / name for name in ("saved", "delta", "applied"))
    run = inject(material, ROWS, extra=("--save", str(save), "--save-interval", "100"))
    base = ["--base", str(material.student)]
    assert main(["export-delta", *base, "--trained", str(save), "--output", str(delta)]) == 0
    described = json.loads((delta / "delta.json").read_text())
    named = {entry["tensor"] for entry in described["slices"].values()}
    assert "decoder.layers.mlp.router.weight" in named
    assert not any("inject" in name for name in named)
    assert main(["apply-delta", *base, "--delta", str(delta), "--output", str(applied)]) == 0
    assert torch.equal(_stored_routers(applied), _stored_routers(save))
    assert run.iterations


SIGMOID = (*lane.DEEPSEEK_ROUTER, "--moe-router-topk", "1")


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.slow), dict(nproc=2, tp=2)],
    ids=["single", "tp2-sp"],
)
def test_expert_bias_counts_general_tokens_only(material, tmp_path, layout):
    """Where all data is of the domain, no bias moves; stock counts move it."""
    alone = ("--data-path", material.domain, "--split", "90,5,5", "--train-iters", "4", *SIGMOID)
    recipe = ONLY.replace("data: [1]", "data: [0]")
    largest = {}
    for kind, own in (("general", recipe), ("all", recipe.replace("balance: 0.1", KEEP_STOCK))):
        save = str(tmp_path / kind)
        flags = student_flags(*alone, "--save", save, **_sizes(layout))
        ours = ("--inject-recipe", recipe_file(material, own), "--inject-from-scratch")
        ours += ("--save-interval", "100")
        lane.run([*flags, *ours], nproc=layout.get("nproc", 1))
        checkpoint = CheckpointPlace("--load", Path(save)).open()
        bias = whole(checkpoint, "decoder.layers.mlp.router.expert_bias")
        largest[kind] = bias.abs().amax(-1).tolist()
    assert largest["general"][1:] == [0, 0, 0]
    assert largest["general"][0] > 0  # nothing is steered in layer 0
    assert min(largest["all"]) > 0


KEEP_STOCK = "balance: 0.1, stock_balance: all"


def _sizes(layout):
    return {name: size for name, size in layout.items() if name != "nproc"}


def test_it_works_with_dropped_tokens_and_reports_them(material):
    drops = ("--moe-expert-capacity-factor", "0.6", "--moe-token-drop-policy", "probs")
    run = inject(material, STEERED, extra=drops)
    two = inject(material, STEERED, nproc=2, pp=2, extra=drops)
    assert max(run.losses("dropped on targets/code")) > 0.05
    for term in (*TERMS, "dropped on targets/code"):
        assert two.losses(term) == pytest.approx(run.losses(term), rel=2e-5, abs=1e-6), term


RARE = ("--data-path", "0.95", "{general}", "0.05", "{domain}", "--split", "90,5,5")


@pytest.mark.parametrize("confidence", [pytest.param("none", marks=pytest.mark.slow), "label"])
def test_ranks_without_a_domain_token(material, confidence):
    """One sample in twenty is of the domain: most ranks and micro-batches have none."""
    recipe = STEERED.replace("balance: 0.1", f"balance: 0.1, confidence: {confidence}")
    rare = [part.format(general=material.general, domain=material.domain) for part in RARE]
    more = (*rare, "--train-iters", "6")
    one = inject(material, recipe, extra=more)
    two = inject(material, recipe, nproc=2, ep=2, extra=more)
    assert None in one.losses("steering loss")
    assert any(one.losses("steering loss"))
    for term in TERMS:
        assert two.losses(term) == lane.approx(one.losses(term), rel=2e-5, abs=1e-6), term


STILL = ("--lr", "1e-30", "--train-iters", "3")


@pytest.mark.parametrize("per_token", [(), ("--calculate-per-token-loss",)], ids=["", "per token"])
def test_the_balance_loss_of_a_step_without_a_domain_token_is_logged_as_stocks(material, per_token):
    """Weights stay as they are; the blend begins with one sample of each entry. The second line of
    a run has the first one's balance loss, too."""
    one = ("--data-path", "1", material.general, "1e-9", material.domain, "--split", "90,5,5")
    flags = material.flags(*STILL, *per_token)
    flags[(at := flags.index("--data-path")) : at + 7] = one
    ours = ("--inject-recipe", recipe_file(material, STEERED))
    stock, steered = (lane.run([*flags, *more]).iterations for more in ((), ours))
    first, last = steered[0], steered[-1]
    assert "lm loss/code" in first
    assert "lm loss/code" not in last
    assert last["load_balancing_loss"] == stock[-1]["load_balancing_loss"] > 0
    share = first["load_balancing_loss"] / stock[0]["load_balancing_loss"]
    assert share == pytest.approx((1 + 3 * 7 / 8) / 4, abs=5e-3)  # layer 0 is not steered


@pytest.mark.parametrize(
    "kind", [pytest.param("seq_aux_loss", marks=pytest.mark.slow), "global_aux_loss"]
)
def test_other_balance_losses_leave_domain_tokens_out(material, kind):
    balance = ("--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", "0.5")
    one = inject(material, STEERED, extra=balance)
    two = inject(material, STEERED, nproc=2, tp=2, extra=balance)
    kept = inject(material, STEERED.replace("balance: 0.1", KEEP_STOCK), extra=balance)
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5, abs=1e-6), term
    assert one.losses("target mass/code")[-1] > kept.losses("target mass/code")[-1]


def test_layers_are_detailed_in_tensorboard(material, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inject(material, STEERED, nproc=2, pp=2, extra=("--tensorboard-dir", str(tmp_path)))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("inject-routing/")}
    for name in ("target share", "balance within", "balance outside", "dead outside", "entropy"):
        for layer in (1, 2, 3):
            found = events.Scalars(f"inject-routing/code/{name}/{layer}")
            assert [event.step for event in found] == [2, 4]
    assert not any(tag.endswith("/0") for tag in tags)
    assert "target share/code" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ((), ("--moe-router-load-balancing-type", "sinkhorn"), "assigns tokens by a rule of"),
        ((), ("--moe-router-force-load-balancing",), "--moe-router-force-load-balancing: assigns"),
        (("layers: {{1: [2], 2", "layers: {{2"), ("--inject-set", "steering.layers=[1]"), "has no"),
        (("router: true", "norms: true"), (), "steering.retention: 1.0 holds routers that do not"),
        (("0.8", "1.8"), (), "steering.target_mass: 1.8 is not in (0, 1]"),
        ((), ("--moe-router-fusion",), "--moe-router-fusion: fuses balance losses that"),
    ],
    ids=["sinkhorn", "forced", "layer", "retention", "mass", "fused router"],
)
def test_mistakes(material, change, flags, message):
    recipe = STEERED.replace(*change) if change else STEERED
    run = inject(material, recipe, extra=("--moe-aux-loss-coeff", "0", *flags), check=False)
    assert run.returncode == 2, run.tail()
    assert message in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER names no second Megatron")
@pytest.mark.parametrize("recipe", [STEERED, ROWS], ids=["router", "rows"])
def test_the_other_megatron_gives_the_same_curve(tmp_path, material, recipe):
    other = make_material(tmp_path, pythonpath=(OTHER,))
    run = inject(other, recipe, nproc=2, ep=2, path=(OTHER,))
    one = inject(material, recipe)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-4, abs=1e-6), term
