"""Two domains with adapters of their own on the same matrices, through the real ``pretrain()``."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_inject.adapters.merge import merge_adapters
from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.domain_choice import DomainChoice
from megatron_moe_inject.host.stored_adapters import StoredAdapters
from tests.harness import lane
from tests.harness.checkpoints import whole
from tests.harness.corpus import write_corpus
from tests.harness.evaluating import EVALUATIONS, evaluate
from tests.harness.grouped import grouped
from tests.harness.injection import (
    LAYOUTS,
    OTHER,
    PROVEN,
    TERMS,
    assert_clean_end,
    inject,
    recipe_file,
)
from tests.harness.material import make_material, make_student, student_flags

BOTH = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{0: [1], 1: [0, 3], 2: [3], 3: [2, 3]}}}}
  - name: html
    data: [2]
    teacher: coder
    experts: {{layers: {{0: [1, 2], 1: [0], 3: [3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 1.0}}
train:
  experts: none
  norms: true
  adapters:
    - {{targets: [experts], rank: 4, alpha: 16, lr: 2, lr_b: 2, by: domain}}
    - {{targets: [attention, router], rank: 2, alpha: 8, layers: [1, 2], lr: 1, by: domain, domains: [html]}}
    - {{targets: [attention], rank: 2, layers: [3], lr: 1, decay: 0.5, by: domain}}
"""  # noqa: E501
ALONE = BOTH.replace("  norms: true\n", "")
"""Nothing but these adapters trains."""
EXPERTS = ALONE[: ALONE.index("    - {{targets: [attention, router]")]
slow = pytest.mark.slow
ETP = ("--expert-tensor-parallel-size", "2")
PADDED = ("--moe-expert-capacity-factor", "0.8", "--moe-pad-expert-input-to-capacity")
UNBALANCED = ("--moe-router-load-balancing-type", "none")
"""Balance is a loss that all tokens have, taken by micro-batch."""
GATHERED = ("--moe-token-dispatcher-type", "allgather")


def blend_of(material):
    """Data flags: general text, and one corpus of each domain."""
    third = Path(material.folder) / "third"
    if not third.with_suffix(".idx").exists():
        write_corpus(third, 11, np.random.default_rng(3))
    paths = ("0.3", material.general, "0.4", material.domain, "0.3", str(third))
    return ("--data-path", *paths, "--split", "90,5,5")


def run(material, recipe=BOTH, *extra, **more):
    return inject(material, recipe, extra=(*blend_of(material), *extra), **more)


def at(material, layout, *extra, recipe=BOTH, **more):
    sizes = dict(LAYOUTS[layout])
    return run(material, recipe, *sizes.pop("extra", ()), *extra, **sizes, **more)


def assert_same(found, expected, rel=2e-5):
    assert PROVEN.search(found.output)
    for term in (*TERMS, "kd loss/html", "lm loss/html"):
        assert found.losses(term) == pytest.approx(expected.losses(term), rel=rel), term


@pytest.fixture(scope="module")
def one(material):
    return run(material)


RECOMPUTED = LAYOUTS["selective recompute"]["extra"]
CASES = {
    "ep2, selective recompute": ("ep2", RECOMPUTED),
    "tp2-sp, experts divided": ("tp2-sp", ETP),
    "pp2, full recompute": ("pp2", LAYOUTS["full recompute"]["extra"]),
    "cp2": ("cp2", ()),
    "pp2-vpp2": ("pp2-vpp2", ()),
    "dp2, distributed optimizer": ("dp2, distributed optimizer", ()),
    "ep2, gathered": ("ep2", GATHERED),
    "tp2-ep2": ("tp2-ep2", ()),
    "tp2-pp2": ("tp2-pp2", ()),
}
MAIN = ("ep2, selective recompute", "pp2, full recompute")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in MAIN else slow) for case in CASES]
)
def test_a_layout_gives_what_one_process_gives(material, one, case):
    assert_same(at(material, *CASES[case][:1], *CASES[case][1]), one)


@slow
def test_four_expert_ranks_give_what_one_gives(material, one):
    assert_same(run(material, nproc=4, ep=4), one)


@slow
def test_experts_that_are_filled_up_to_a_capacity(material):
    """Whose rows differ by rank: compared where all ranks see the same tokens."""
    assert_same(at(material, "ep2", *PADDED, recipe=EXPERTS), run(material, EXPERTS, *PADDED))


def test_grouped_experts_train_as_one_by_one(material):
    found = grouped(material, *blend_of(material), recipe=EXPERTS, nproc=2, ep=2)
    assert_same(found, run(material, EXPERTS))


def stored(folder):
    """By domain and name its factors, each with the optimizer's first moment."""
    checkpoint = CheckpointPlace("--trained", Path(folder)).open()
    adapters, trained = StoredAdapters(checkpoint), checkpoint.with_training_state()
    found = {domain: {} for domain in adapters.domains}
    for pair in (pair for pairs in adapters.pairs.values() for pair in pairs):
        for name in (pair.a, pair.b):
            moment = whole(trained, f"optimizer.state.exp_avg.{name}")
            found[pair.domain][name] = (adapters.read(name), moment)
    return found


def saving(folder, *extra):
    return ("--save", str(folder), "--save-interval", "4", *extra)


def test_a_domain_whose_tokens_have_no_loss_keeps_its_factors(material, tmp_path):
    """Bitwise as they began, moments zero, at EP 2; the other domain's end as they do without them,
    and as they do where that domain has the only factors."""
    later = "data: [2]\n    beta: 0\n    alpha: {{points: {{1000: 0, 2000: 1}}}}"
    silent = EXPERTS.replace("data: [2]", later)
    assert silent != EXPERTS
    only = silent.replace("by: domain}}", "by: domain, domains: [code]}}")
    runs = {"both": (silent, ()), "start": (silent, ("--lr", "1e-20")), "only": (only, ())}
    for name, (recipe, extra) in runs.items():
        run(material, recipe, *saving(tmp_path / name), *UNBALANCED, *extra, nproc=2, ep=2)
    both, start, code = (stored(tmp_path / name) for name in ("both", "start", "only"))
    assert both["html"].keys() == start["html"].keys()
    for name, (factor, moment) in both["html"].items():
        assert torch.equal(factor, start["html"][name][0]), name
        assert not moment.any(), name
        assert factor.any() == (".a." in name), name
    assert set(code) == {"code"}
    assert both["code"].keys() == code["code"].keys()
    for name, (factor, moment) in both["code"].items():
        assert moment.any(), name
        assert not torch.equal(factor, start["code"][name][0]), name
        torch.testing.assert_close(factor, code["code"][name][0], rtol=1e-4, atol=1e-6)


def test_general_text_is_the_bases_bitwise(material):
    """Its loss in every step is that of a run whose adapters do not move."""
    found = run(material, ALONE)
    still = run(material, ALONE, "--lr", "1e-30", "--min-lr", "0")
    assert found.losses("lm loss/general") == still.losses("lm loss/general")
    assert found.losses("retention loss") == [0.0] * 4
    assert found.losses("lm loss/code")[-1] != still.losses("lm loss/code")[-1]
    assert found.losses("lm loss/html")[-1] != still.losses("lm loss/html")[-1]
    assert "general text passes none" in found.output
    assert "which general text does not pass" in found.output


def test_merged_by_one_domain_it_is_that_domain_of_the_run(material, tmp_path):
    """Measured at the end of the run with both domains' adapters beside, and of a student with one
    domain's in it."""
    save = tmp_path / "saved"
    measure = ("--inject-set", f"evaluation.file={tmp_path / 'run.jsonl'}", "evaluation.gate=false")
    run(material, ALONE, *saving(save), *EVALUATIONS, *measure, nproc=2, tp=2)
    start, *_, beside = read_list(tmp_path / "run.jsonl")
    assert beside.classes["general"].sums["loss"] == pytest.approx(
        start.classes["general"].sums["loss"], rel=0
    )
    for domain, other in (("code", "html"), ("html", "code")):
        merged = tmp_path / domain
        choice = DomainChoice({domain: 1.0})
        place = CheckpointPlace("--trained", save)
        merge_adapters(place, merged, lambda items, _: items, choice)
        loaded = ("--finetune", "--eval-interval", "2", "--train-iters", "4", *blend_of(material))
        path = tmp_path / f"{domain}.json"
        alone = evaluate(material, path, *loaded, recipe=ALONE, load=str(merged)).classes
        losses = {name: measured.sums["loss"] for name, measured in alone.items()}
        assert losses[domain] == pytest.approx(beside.classes[domain].sums["loss"], rel=1e-6)
        assert losses[domain] != pytest.approx(start.classes[domain].sums["loss"], rel=1e-3)
        assert losses[other] != pytest.approx(beside.classes[other].sums["loss"], rel=1e-4)


KEPT = {
    "to another layout": ({"nproc": 2, "tp": 2}, {"nproc": 2, "pp": 2}, 1e-5),
    "to more expert ranks": ({"nproc": 2, "ep": 2}, {"nproc": 4, "ep": 4}, 1e-5),
    "bf16, distributed optimizer": (
        *[dict(nproc=2, ep=2, extra=("--bf16", *lane.DISTRIBUTED_OPTIMIZER))] * 2,
        0,
    ),
}


@pytest.mark.parametrize(
    ("first", "then", "rel"),
    [
        pytest.param(*case, id=name, marks=[] if name == "bf16, distributed optimizer" else slow)
        for name, case in KEPT.items()
    ],
)
def test_a_resumed_run_goes_on(material, tmp_path, first, then, rel):
    save = tmp_path / "saved"
    keep = ("--save", str(save), "--save-interval", "2", "--train-iters", "4")
    first, then = dict(first), dict(then)
    flags, more = (layout.pop("extra", ()) for layout in (first, then))
    full = run(material, ALONE, *flags, "--train-iters", "4", **first)
    run(material, ALONE, *flags, *keep, "--exit-interval", "2", **first)
    nproc = then.pop("nproc", 1)
    on = ("--inject-recipe", recipe_file(material, ALONE), "--load", str(save), *keep, *more)
    resumed = lane.run(student_flags(*blend_of(material), *on, **then), nproc=nproc)
    for term in TERMS:
        expected = full.losses(term)[2:]
        assert resumed.losses(term) == (pytest.approx(expected, rel=rel) if rel else expected), term


def test_other_domains_do_not_go_on(material, tmp_path):
    keep = ("--save", str(tmp_path / "s"), "--save-interval", "2", "--train-iters", "4")
    run(material, EXPERTS, *keep, "--exit-interval", "2")
    other = EXPERTS.replace("by: domain}}", "by: domain, domains: [code]}}")
    on = ("--inject-recipe", recipe_file(material, other), "--load", keep[1], *keep)
    found = lane.run(student_flags(*blend_of(material), *on, "--no-load-optim"), check=False)
    both = "holds those of rank 4, alpha 16.0 on experts of code and rank 4, alpha 16.0 on experts"
    now = "of html, but now rank 4, alpha 16.0 on experts of code are asked for"
    assert_clean_end(found, (both, now))


def test_the_output_layer_by_pattern_ends_at_start(material):
    named = EXPERTS.replace("[experts], rank: 4", "[experts, 'output_layer.*'], rank: 4")
    assert named != EXPERTS
    found = run(material, named, nproc=2, ep=2, check=False)
    assert_clean_end(found, ("train.adapters[0]: names output_layer.weight, whose product is",))


@slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_megatron(tmp_path):
    material = make_material(tmp_path, [OTHER])
    expected = run(material, path=[OTHER])
    for case in list(CASES)[:3]:
        assert_same(at(material, *CASES[case][:1], *CASES[case][1], path=[OTHER]), expected)


OVERLAP = ("--overlap-moe-expert-parallel-comm",)


@slow
def test_overlapped_expert_communication_changes_nothing(material):
    """Bit for bit in bf16."""
    both = [run(material, BOTH, "--bf16", *more, nproc=2, ep=2) for more in ((), OVERLAP)]
    lane.same_runs(*both)


SHARED = BOTH.replace("[attention, router]", "[attention, router, shared_experts]")
LATENT = (
    *("--multi-latent-attention", "--kv-lora-rank", "16", "--q-lora-rank", "16"),
    *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "8"),
)
STUDENTS = {
    "shared experts, prediction of two tokens": (
        (*lane.DEEPSEEK_ROUTER, "--mtp-num-layers", "1"),
        SHARED,
    ),
    "latent attention": (LATENT, BOTH),
}


@slow
@pytest.mark.parametrize(("more", "recipe"), STUDENTS.values(), ids=STUDENTS)
def test_other_students(material, tmp_path, more, recipe):
    """By SGD: Adam makes more than rounding of gradients that are near none."""
    student = str(tmp_path / "student")
    make_student(student, material.general, *more)
    extra = (*more, "--load", student, "--optimizer", "sgd", "--lr", "0.5")
    expected = run(material, recipe, *extra)
    for layout in ("ep2", "tp2-sp", "selective recompute"):
        assert_same(at(material, layout, *extra, recipe=recipe), expected, rel=2e-6)


PACKED = ("--dataloader-inter-document-masking", "--reset-position-ids")


@slow
def test_packed_documents_of_two_samples_in_a_row(material):
    """A row of two samples, which may be of two domains, against rows of one."""
    expected = run(material, BOTH, *PACKED, "--micro-batch-size", "1", *UNBALANCED)
    for layout in ({}, {"nproc": 2, "tp": 2}):
        assert_same(run(material, BOTH, *PACKED, *UNBALANCED, **layout), expected)
