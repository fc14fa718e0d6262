"""Teachers of other kinds than the injection tests' own, through the real ``pretrain()``."""

import pytest

from tests.harness.injection import PROVEN, TERMS, inject


@pytest.fixture(scope="module")
def single(material, llama):
    return inject(material, extra=hugging_face(llama))


def hugging_face(folder) -> tuple[str, str]:
    return "--inject-set", f"teachers.coder.source=hf:{folder}"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(dict(tp=2), id="tp2-sp"),
        pytest.param(dict(pp=2), id="pp2"),
        pytest.param(dict(cp=2), id="cp2"),
    ],
)
def test_a_hugging_face_teacher_gives_one_curve_at_every_layout(material, llama, single, layout):
    run = inject(material, nproc=2, extra=hugging_face(llama), **layout)
    assert all(step["kd loss"] > 0 for step in run.iterations)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)


def test_it_is_another_teacher_than_the_megatron_one(material, single):
    """So that the curves above say something."""
    megatron = inject(material)
    assert megatron.losses("lm loss")[0] == pytest.approx(single.losses("lm loss")[0], rel=1e-6)
    assert megatron.losses("kd loss")[0] != pytest.approx(single.losses("kd loss")[0], rel=1e-2)
