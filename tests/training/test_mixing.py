"""Shares of the blend through the real ``pretrain()``."""

import pytest

from tests.training.test_injection import RECIPE, inject

MIXED = RECIPE + "mixing: {{general: 0.4}}\n"


@pytest.fixture(scope="module")
def weighted(material):
    """The same blend, its weights on the command line."""
    return inject(material)


@pytest.mark.parametrize("layout", [{}, dict(nproc=2, pp=2)], ids=str)
def test_a_blend_without_weights_trains_as_one_with_them(material, weighted, layout):
    plain = ("--data-path", material.general, material.domain, "--split", "90,5,5")
    run = inject(material, MIXED, extra=plain, **layout)
    assert run.losses("total loss") == pytest.approx(weighted.losses("total loss"), rel=2e-5)
    for step in run.iterations:
        assert step["data share/code"] + step["data share/general"] == pytest.approx(1, rel=1e-5)
    assert 0.2 < sum(run.losses("data share/general")) / 4 < 0.6
    assert "data share/code" not in weighted.iterations[0]


def test_weights_of_another_share_are_an_error(material):
    run = inject(material, MIXED.replace("0.4", "0.1"), check=False)
    assert run.returncode == 2
    assert "mixing: general has 40.0% of the training blend, but 10.0% is asked for" in run.output
