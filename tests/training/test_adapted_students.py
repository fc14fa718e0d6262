"""Adapters on students of every kind at layouts that divide them, what they end in, and the student
without them."""

import functools
import re

import pytest
import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.stored_adapters import StoredAdapters
from tests.harness import lane
from tests.harness.injection import LAYOUTS, PROVEN, inject, recipe_file

RECIPE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{0: [1], 1: [0, 3], 2: [3], 3: [2, 3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 1.0}}
train:
  experts: none
  adapters:
    - {{targets: [experts], rank: 4, alpha: 8, lr: 2}}
    - {{targets: [attention, router], rank: 2, lr: 2}}
"""
TERMS = ("lm loss", "kd loss", "retention loss", "grad norm")
DENSE = RECIPE.replace("    experts: {{layers: {{0: [1], 1: [0, 3], 2: [3], 3: [2, 3]}}}}\n", "")


def adapted(*targets, rows=""):
    """``RECIPE`` of a student without chosen experts, with adapters on these."""
    own = f"    - {{{{targets: [{', '.join(targets)}], rank: 4, alpha: 8, lr: 2}}}}\n"
    return DENSE[: DENSE.index("    - {{targets: [experts]")] + own + rows


ROWS = "  vocabulary_rows: {{ids: [3, 5, 17, 40, 41, 60], lr: 2}}\n"
TIED = "--untie-embeddings-and-output-weights"
SHARED = (*lane.MOE, "--moe-shared-expert-intermediate-size", "64")
LATENT = (
    *(*lane.MOE, "--multi-latent-attention", "--kv-lora-rank", "16", "--q-lora-rank", "16"),
    *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "8"),
)
TP2 = ("--tensor-model-parallel-size", "2")
SP, ONE_EXPERT_RANK = ("--sequence-parallel",), ("--expert-tensor-parallel-size", "1")
EP2 = ("--expert-model-parallel-size", "2")
KINDS = {
    "dense, TP 2": ((), (), adapted("mlp", "attention", "output_layer"), TP2),
    "dense, rows, TP 2": ((), (), adapted("mlp", rows=ROWS), TP2),
    "dense, rows, TP 2 + SP": ((), (), adapted("mlp", rows=ROWS), (*TP2, *SP)),
    "dense, tied rows, TP 2": ((), (TIED,), adapted("mlp", rows=ROWS), TP2),
    "dense, tied rows, TP 2 + SP": ((), (TIED,), adapted("mlp", rows=ROWS), (*TP2, *SP)),
    "shared experts, TP 2 + SP": (
        *(SHARED, (), adapted("shared_experts", "router")),
        (*TP2, *SP, *ONE_EXPERT_RANK),
    ),
    "shared experts, EP 2": (SHARED, (), adapted("shared_experts"), EP2),
    "latent attention, TP 2 + SP": (
        *(LATENT, (), adapted("attention")),
        (*TP2, *SP, *ONE_EXPERT_RANK),
    ),
    "latent attention, EP 2": (LATENT, (), adapted("attention"), EP2),
}


SELDOM = ("dense, rows, TP 2", "dense, tied rows, TP 2 + SP", "shared experts, EP 2")
SELDOM += ("latent attention, TP 2 + SP", "dense, TP 2", "dense, tied rows, TP 2")


@pytest.fixture(scope="module")
def train(material, tmp_path_factory):
    """A run of a kind of student at a layout; each student is made, and each run taken, once."""

    @functools.cache
    def student(more, without):
        small = [f for f in lane.dense("--eval-iters", "0") if f not in ("--mock-data", *without)]
        small += ["--vocab-size", "61", "--make-vocab-size-divisible-by", "16"]
        small += [*more, *material.blend]
        start = str(tmp_path_factory.mktemp("student"))
        lane.run([*small, "--train-iters", "1", "--save", start, "--save-interval", "9"])
        return [*small, "--load", start, "--finetune", "--no-load-optim", "--no-load-rng"]

    @functools.cache
    def run(more, without, recipe, layout=()):
        ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
        return lane.run([*student(more, without), *ours, *layout], nproc=2 if layout else 1)

    return run


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SELDOM)) for kind in KINDS]
)
def test_a_layout_gives_what_one_process_gives(train, kind):
    *student, layout = KINDS[kind]
    one, two = train(*student), train(*student, layout)
    assert PROVEN.search(two.output)
    assert one.losses("retention loss")[-1] > 0
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5, abs=1e-7), term


@pytest.mark.slow
def test_all_expert_parallel_sizes_end_in_the_same_adapters(material, tmp_path):
    """The factors themselves, by their global names."""
    found = []
    for ep in (1, 2, 4):
        save = tmp_path / str(ep)
        keep = ("--save", str(save), "--save-interval", "4")
        inject(material, RECIPE, nproc=ep, ep=ep, extra=keep)
        stored = StoredAdapters(CheckpointPlace("--trained", save).open())
        pairs = [pair for site in stored.pairs.values() for pair in site]
        found.append({name: stored.read(name) for pair in pairs for name in (pair.a, pair.b)})
    assert len(found[0]) == 2 * (2 * 6 + 4 * 3)
    assert all(factor.any() for factor in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, factor in other.items():
            torch.testing.assert_close(factor, found[0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", [None, "ep2", pytest.param("tp2-sp", marks=pytest.mark.slow)])
def test_without_its_adapters_a_trained_student_is_the_original_bitwise(material, layout):
    sizes = dict(LAYOUTS[layout]) if layout else {}
    nproc = sizes.pop("nproc", 1)
    own = ("--inject-recipe", recipe_file(material, RECIPE + ROWS), *sizes.pop("extra", ()))
    script = (str(lane.HARNESS / "original_gpt.py"),)
    run = lane.run(material.flags(*own, **sizes), nproc=nproc, script=script)
    said = re.findall(r"^original: (.*)$", run.output, re.M)
    assert said == ["bitwise, and another with adapters"] * nproc
