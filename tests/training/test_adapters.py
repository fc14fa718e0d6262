"""Adapters through the real ``pretrain()``: at every layout the run of one process, from the
original model on, resumed bitwise, with nothing else moved."""

import pytest

from tests.harness.grouped import grouped
from tests.harness.injection import LAYOUTS, PROVEN, TERMS, inject

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
  norms: true
  adapters:
    - {{targets: [experts], rank: 4, alpha: 16, lr: 2, lr_b: 2}}
    - {{targets: [attention, router], rank: 2, alpha: 8, scaling: rslora, layers: [1, 2], decay: 0.5}}
"""  # noqa: E501
ALONE = RECIPE.replace("  norms: true\n", "")
EXPERTS = RECIPE[: RECIPE.index("    - {{targets: [attention")].replace("  norms: true\n", "")

SHARED = ("--moe-shared-expert-intermediate-size", "64")
ETP = ("--expert-tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def one(material):
    return inject(material, RECIPE)


@pytest.mark.parametrize("layout", ["ep2", "tp2-sp", "pp2", "cp2", "full recompute"])
def test_a_layout_gives_what_one_process_gives(material, one, layout):
    run = inject(material, RECIPE, **LAYOUTS[layout])
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


@pytest.mark.parametrize("layout", [None, "ep2, distributed optimizer"])
def test_grouped_experts_train_as_one_by_one(material, layout):
    sizes = dict(LAYOUTS[layout]) if layout else {}
    run = grouped(material, *sizes.pop("extra", ()), recipe=EXPERTS, **sizes)
    one = inject(material, EXPERTS)
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


def test_experts_may_be_divided(material, one):
    run = inject(material, RECIPE, nproc=2, tp=2, extra=ETP)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


ROWS = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{0: [1], 1: [0, 3]}}}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 1.0}}
train:
  experts: none
  adapters: [{{targets: [experts], rank: 4, alpha: 16}}]
  vocabulary_rows: {{domain: code, budget: 0.4, lr: 3}}
"""


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2, distributed optimizer", "tp2-pp2"])
def test_rows_of_the_vocabulary(material, layout):
    one = inject(material, ROWS)
    run = inject(material, ROWS, **LAYOUTS[layout])
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
