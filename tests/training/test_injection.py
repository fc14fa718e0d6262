"""Injection through the real ``pretrain()``: what trains, from what, and nothing frozen moves.

That the curve is the same at every layout is in ``test_array_*.py``.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_inject.contracts import EVERYTHING
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.host.contract import Hooked
from tests.harness import lane
from tests.harness.injection import (
    CE_ONLY,
    LAYOUTS,
    OTHER,
    PROVEN,
    RECIPE,
    TERMS,
    inject,
    recipe_file,
)
from tests.harness.material import EVALUATES, make_material, student_flags
from tests.harness.profiles import from_counts


@pytest.fixture(scope="session")
def single(material):
    """The curve of one process."""
    return inject(material, extra=EVALUATES)


def test_terms_are_reported_and_add_up(single):
    for step in single.iterations:
        assert step["kd loss"] > 0
        share = (step["lm loss/general"] - step["lm loss"]) / (
            step["lm loss/general"] - step["lm loss/code"]
        )
        assert 0.3 < share < 0.9
        whole = 0.3 * step["lm loss"] + 0.7 * share * step["kd loss"]
        assert step["total loss"] == pytest.approx(whole, rel=1e-4)


def test_distillation_moves_the_student_towards_the_teacher(material):
    """Distillation alone, into all experts: the student follows what it was never shown as text."""
    only = ("--inject-set", "train.experts=all", "objective.alpha=1.0", "objective.beta=0.0")
    run = inject(material, extra=("--train-iters", "30", *lane.ONE_BATCH, *only))
    first, last = run.iterations[0], run.iterations[-1]
    assert last["kd loss"] < 0.9 * first["kd loss"]
    assert last["lm loss/code"] < first["lm loss/code"] - 0.3


COMPONENTS = ("router", "attention", "norms", "embedding", "output_layer")


@pytest.mark.parametrize(
    "component",
    [
        pytest.param(c, marks=[pytest.mark.slow] if c in ("attention", "norms") else [])
        for c in COMPONENTS
    ],
)
def test_a_single_component_trains_and_nothing_else(material, component):
    """No experts; of two stages one trains nothing where it lacks the component."""
    only = ("--inject-set", "train.experts=none", f"train.{component}=true")
    one = inject(material, extra=only)
    two = inject(material, nproc=2, pp=2, extra=only)
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
    assert PROVEN.search(one.output)
    assert PROVEN.search(two.output)
    assert one.losses("total loss")[-1] != one.losses("total loss")[0]
    assert min(one.losses("grad norm")) > 0


@pytest.mark.parametrize("layout", [{}, {"nproc": 2, "tp": 2}], ids=["single", "tp2-sp"])
def test_cross_entropy_with_everything_training_is_stock_training(material, layout):
    """The head trains too; the vocabulary needs no padding, which stock would count."""
    layout = dict(layout)
    nproc = layout.pop("nproc", 1)
    fresh = student_flags(*material.blend, "--vocab-size", "64", "--train-iters", "4", **layout)
    stock = lane.run(fresh, nproc=nproc)
    anew = ("--inject-from-scratch", "--inject-recipe", recipe_file(material, CE_ONLY))
    ours = lane.run([*fresh, *anew], nproc=nproc)
    assert ours.losses("lm loss") == pytest.approx(stock.losses("lm loss"), rel=2e-5)
    assert ours.losses("total loss") == pytest.approx(stock.losses("lm loss"), rel=2e-5)
    assert ours.losses("grad norm") == pytest.approx(stock.losses("grad norm"), rel=2e-4)


HEAD_TRAINS = ("--inject-set", "train.output_layer=true")


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_a_trained_head_learns_the_same_from_one_pass_as_from_two(material, precision):
    """On mixed micro-batches, whose two kinds of sample have a gradient of the head each."""
    one, two = (
        inject(material, extra=(*precision, *HEAD_TRAINS, f"objective.masked_sum={masked_sum}"))
        for masked_sum in ("true", "false")
    )
    for term in TERMS:
        rel = 2e-3 if precision else 2e-5
        assert one.losses(term) == pytest.approx(two.losses(term), rel=rel), term


def test_a_script_with_another_loss_function_is_told_what_to_set(material, tmp_path):
    """Its loss is no multiple of the masked sum, so the head's gradient needs a second pass."""
    stock = Path(lane.MINIMAL_GPT[0]).read_text()
    script = tmp_path / "squared.py"
    script.write_text(stock.replace("output.view(-1).float() *", "output.view(-1).float() ** 2 *"))
    assert script.read_text() != stock
    flags = material.flags("--inject-recipe", recipe_file(material), *HEAD_TRAINS)
    told = lane.run(flags, script=(str(script),), check=False)
    assert told.returncode != 0
    assert not told.iterations
    assert "set objective.masked_sum: false" in told.output
    run = lane.run([*flags, "objective.masked_sum=false"], script=(str(script),))
    assert all(0 < norm < 100 for norm in run.losses("grad norm"))


def test_frozen_parameters_stay_bitwise_under_adamw_with_decay_in_bf16(material, single):
    run = inject(material, nproc=2, ep=2, extra=("--bf16",))
    assert PROVEN.search(run.output)
    assert run.losses("total loss") == pytest.approx(single.losses("total loss"), rel=0.02)


@pytest.mark.slow
def test_killed_and_resumed_run_in_bf16_gives_the_same_curve(material, tmp_path):
    """Bitwise: everything trained, the optimizer's state and the data order come back."""
    save = str(tmp_path / "resumed")
    keep = ("--bf16", "--train-iters", "6", "--save", save, "--save-interval", "3")
    whole = inject(material, nproc=2, ep=2, extra=("--bf16", "--train-iters", "6"))
    inject(material, nproc=2, ep=2, extra=(*keep, "--exit-interval", "3"))
    ours = ("--inject-recipe", recipe_file(material), "--load", save)
    resumed = lane.run(student_flags(*material.blend, *keep, *ours, ep=2), nproc=2)
    for term in TERMS:
        assert resumed.losses(term) == whole.losses(term)[3:], term


BY_NAME = RECIPE.replace(
    "objective:",
    "train:\n  experts: none\n  layers: [3]\n"
    "  patterns: ['*.2.mlp.experts.3.*', '*.final_layernorm.*']\nobjective:",
)


@pytest.fixture(scope="module")
def by_name(material):
    return inject(material, BY_NAME)


@pytest.mark.parametrize("layout", [pytest.param("ep2", marks=pytest.mark.slow), "tp2-sp", "pp2"])
def test_layers_and_parameters_train_by_name(material, by_name, layout):
    run = inject(material, BY_NAME, **LAYOUTS[layout])
    for term in TERMS:
        assert run.losses(term) == pytest.approx(by_name.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)
    assert "layers 3, *.2.mlp.experts.3.*, *.final_layernorm.*; everything else is frozen" in (
        run.output
    )


def test_a_pattern_that_matches_nothing_on_any_rank_is_an_error(material):
    recipe = BY_NAME.replace("*.2.mlp.experts.3.*", "*.2.mlp.experts.4.*")
    run = inject(material, recipe, nproc=2, ep=2, check=False)
    assert run.returncode == 2, run.tail()
    assert "train.patterns[0]: '*.2.mlp.experts.4.*' matches no parameter" in run.output
    assert "Traceback" not in run.output


def test_a_pattern_does_not_reach_one_half_of_a_shared_matrix(material):
    tied = [f for f in material.flags() if f != "--untie-embeddings-and-output-weights"]
    at = tied.index("--load")
    recipe = BY_NAME.replace("*.final_layernorm.*", "embedding.*")
    anew = ("--inject-from-scratch", "--inject-recipe", recipe_file(material, recipe))
    run = lane.run([*tied[:at], *tied[at + 2 :], *anew], check=False)
    assert run.returncode == 2, run.tail()
    assert "train.patterns[1]: 'embedding.*' names the matrix that embedding and output" in (
        run.output
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(("3: [3]", "3: [2]"), "experts {2: [3], 3: [2]} trains", id="another expert"),
        pytest.param(
            *(("2: [3], ", ""), "experts {3: [3]} trains"),
            id="fewer experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(("objective:", "train: {{norms: true}}\nobjective:"), "3: [3]} and norms trains"),
            id="more components",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_that_trains_something_else_is_told(material, tmp_path, change, named):
    save = str(tmp_path / "resumed")
    keep = ("--train-iters", "4", "--save", save, "--save-interval", "2")
    inject(material, extra=(*keep, "--exit-interval", "2"))
    ours = ("--inject-recipe", recipe_file(material, RECIPE.replace(*change)), "--load", save)
    run = lane.run(student_flags(*material.blend, *keep, *ours), check=False)
    assert run.returncode == 2, run.tail()
    assert "holds the optimizer state of experts {2: [3], 3: [3]}, but now" in run.output
    assert named in run.output
    assert "add --no-load-optim" in run.output
    assert "Traceback" not in run.output
    anew = lane.run(student_flags(*material.blend, *keep, *ours, "--no-load-optim"))
    assert [step["iteration"] for step in anew.iterations] == [3, 4]


def test_a_stock_checkpoint_needs_no_flag(material):
    """Its weights and iteration are taken, its optimizer state is not."""
    ours = ("--inject-recipe", recipe_file(material), "--train-iters", "5")
    flags = student_flags(*material.blend, *ours, "--load", material.student)
    run = lane.run(flags)
    assert "was saved without injection: its optimizer state is left" in run.output
    assert [step["iteration"] for step in run.iterations] == [4, 5]
    told = lane.run([*flags, "--no-load-optim"])
    assert told.losses("total loss") == run.losses("total loss")


def test_a_deepseek_like_student_with_mtp_trains_and_keeps_its_router_bias(material, tmp_path):
    """Sigmoid router with groups and expert bias, shared expert, MTP; from a random start."""
    like = (*lane.DEEPSEEK_ROUTER, "--mtp-num-layers", "1", "--moe-router-topk", "1")
    flags = student_flags(
        *(*material.blend, "--train-iters", "3", *like, "--inject-verify-frozen"),
        *("--inject-recipe", recipe_file(material), "--inject-from-scratch"),
        ep=2,
    )
    run = lane.run(flags, nproc=2)
    assert PROVEN.search(run.output)
    assert all(step["kd loss"] > 0 for step in run.iterations)
    assert "mtp_1 loss" in run.output


def test_evaluation_reports_the_same_terms(single):
    evaluation = single.evaluations[-1]
    for term in ("lm loss", "kd loss", "total loss", "lm loss/code", "lm loss/general"):
        assert evaluation[term] > 0, term


def test_dry_run_prints_the_plan_and_what_is_wrapped_and_trains_nothing(material):
    """It needs no folder to write to."""
    recipe = RECIPE + "evaluation: {{}}\n"
    more = "steering={coeff: 0.01, target_mass: 0.5}", "retention.experts=0.1"
    extra = (*EVALUATES, "--inject-set", *more, "--inject-dry-run")
    run = inject(material, recipe, extra=extra, nproc=2, ep=2)
    assert "moe-inject plan" in run.output
    assert "training needs it: evaluation.file: missing" in run.output
    assert "nothing on 1 of 2 ranks" in run.output
    assert run.returncode == 0
    assert not run.iterations
    rows = set(re.findall(r"^  (\S+(?: \S+)*)  +(\d+)  ([a-z]\S*)$", run.output, re.M))
    assert rows >= {
        ("megatron.training.training.train", "1", "install"),
        ("megatron.training.arguments.validate_args", "1", "host.cpu_lane.flags"),
        ("GPTModel forward pre-hook", "2", "host.loss_seam"),
        ("TransformerBlock.forward", "2", "experts.train.boundary"),
        ("MoEAlltoAllTokenDispatcher.dispatch_preprocess", "8", "retention.experts"),
        ("SequentialMLP.forward", "8", "retention.experts"),
        ("TopKRouter.routing", "8", "host.routing_watch"),
        ("TopKRouter.routing", "4", "routing.steering"),
        ("ChainedOptimizer.sharded_state_dict", "2", "experts.train.optimizer_state"),
    }
    planned = {
        use.kind if isinstance(use, Hooked) else use.name
        for part in EVERYTHING
        for use in part.wraps
    }
    assert {at.partition(" ")[2] or at.rpartition(".")[2] for at, _, _ in rows} <= planned


def test_experts_by_profile_are_the_experts_that_train(material, single):
    """Expert 3 of layers 2 and 3 is what the domain uses most, so the curve is that of its ids."""
    counts = [[40, 30, 20, 10], [10, 20, 40, 30], [10, 20, 30, 40], [20, 20, 15, 45]]
    file = material.folder / "profile.json"
    write_profile(file, from_counts(counts, topk=1))
    choice = f"profile: {file}, method: top_n, n: 1, only_layers: [2, 3]"
    recipe = RECIPE.replace("layers: {{2: [3], 3: [3]}}", choice)
    refused = inject(material, recipe, check=False)
    assert refused.returncode == 2
    assert "is of a student with experts per token 1, and this one has 2" in refused.output
    write_profile(file, from_counts(np.array(counts) * 2, topk=2))
    run = inject(material, recipe, nproc=2, ep=2)
    assert "code: token share, 1 per layer, layers 2-3, class code of" in run.output
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron_gives_the_same_curve(tmp_path, single):
    """With its own checkpoints: those of a newer Megatron cannot be read by an older one."""
    material = make_material(tmp_path, [OTHER])
    run = inject(material, nproc=2, ep=2, path=[OTHER])
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)
