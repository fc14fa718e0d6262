"""Packed documents without a teacher, of which each micro-batch is one row."""

import pytest

from megatron_moe_inject.host import compat
from tests.harness import lane
from tests.harness.injection import TERMS, inject

RECIPE = """
domains:
  - name: code
    data: [1]
    experts: {{layers: {{2: [3], 3: [3]}}}}
objective: {{alpha: 0, beta: 0.5, general_beta: 0.25}}
"""
PACKED = ("--dataloader-inter-document-masking", "--moe-router-load-balancing-type", "none")
OWN = [term for term in TERMS if term != "kd loss"]

pytestmark = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


@pytest.fixture(scope="module")
def by_sample(material):
    """A sample a micro-batch."""
    return inject(material, RECIPE, extra=(*PACKED, "--micro-batch-size", "1"))


@pytest.mark.parametrize(
    "layout",
    [
        dict(),
        dict(nproc=2, tp=2),
        pytest.param(dict(nproc=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=["one", "tp2-sp", "ep2"],
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_sample_of_a_row_has_the_loss_of_its_class(material, by_sample, layout, size):
    """Half of a class' weight more or less would show in the total and in the gradient."""
    run = inject(material, RECIPE, extra=(*PACKED, "--micro-batch-size", str(size)), **layout)
    for term in OWN:
        assert run.losses(term) == lane.approx(by_sample.losses(term), rel=2e-5), term


def test_steering_takes_rows_of_one_sample(material):
    steered = RECIPE + "steering: {{report: true}}\n"
    run = inject(material, steered, extra=PACKED, check=False)
    assert run.returncode == 2, run.tail()
    assert "in one row, where steering does not tell them apart" in run.output
    inject(material, steered, extra=(*PACKED, "--micro-batch-size", "1", "--train-iters", "1"))
