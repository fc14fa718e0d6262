"""Adapters through the real ``pretrain()``: at every layout the run of one process, from the
original model on, resumed bitwise, with nothing else moved."""

import pytest

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
