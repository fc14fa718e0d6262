"""Teachers of other kinds than the injection tests' own, through the real ``pretrain()``."""

import pytest

from tests.harness.injection import inject


@pytest.fixture(scope="module")
def single(material, llama):
    return inject(material, extra=hugging_face(llama))


def hugging_face(folder) -> tuple[str, str]:
    return "--inject-set", f"teachers.coder.source=hf:{folder}"


def test_it_is_another_teacher_than_the_megatron_one(material, single):
    """So that the curves above say something."""
    megatron = inject(material)
    assert megatron.losses("lm loss")[0] == pytest.approx(single.losses("lm loss")[0], rel=1e-6)
    assert megatron.losses("kd loss")[0] != pytest.approx(single.losses("kd loss")[0], rel=1e-2)
