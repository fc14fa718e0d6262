"""Hybrid checkpoints as teachers, through the real ``pretrain()``.

``*-*-`` with the weights of a GPT teacher is that teacher, digit for digit, for students of both
kinds. Its checkpoint is written by two pipeline stages from the GPT one, which Megatron translates.
"""

import pytest

from tests.harness import lane
from tests.harness.checkpoints import SAVE
from tests.harness.injection import LAYOUTS, PROVEN, RECIPE, assert_clean_end
from tests.harness.material import student_flags

SPLIT = ("--split", "90,5,5")
SMALL = ("--mamba-head-dim", "16", "--mamba-state-dim", "8", "--mamba-num-groups", "2")
START = ("--finetune", "--no-load-optim", "--no-load-rng", "--load")
IMITATING = RECIPE + "imitation: {{hidden: 0.5}}\n"
HYBRID = IMITATING.replace("{{2: [3], 3: [3]}}", "{{3: [3]}}") + "layer_numbers: hybrid\n"
TERMS = ("lm loss", "kd loss", "imitation loss", "total loss", "grad norm")


def teacher_flags(material, pattern: str, *extra: str, **layout: int) -> list[str]:
    """Of a model as wide as the material's teacher, on the domain's text."""
    flags = [f for f in lane.dense(**layout) if f != "--mock-data"]
    sizes = ("--hidden-size", "48", "--ffn-hidden-size", "64", "--vocab-size", "61")
    data = ("--make-vocab-size-divisible-by", "8", "--data-path", material.domain, *SPLIT)
    return [*flags, *sizes, *data, *SMALL, "--hybrid-layer-pattern", pattern, *extra]


@pytest.fixture(scope="module")
def translated(material) -> str:
    """The material's teacher as a hybrid model: one step of no length at PP 2."""
    folder = str(material.folder / "hybrid-teacher")
    still = ("--lr", "0", "--train-iters", "1", *START, material.teacher)
    flags = teacher_flags(material, "*-|*-", *still, *SAVE, folder, pp=2)
    lane.run(flags, nproc=2)
    return folder


@pytest.fixture(scope="module")
def mamba(material) -> str:
    """A teacher with Mamba layers, trained for a moment by two tensor-parallel ranks."""
    folder = str(material.folder / "mamba-teacher")
    taught = ("--lr", "1e-2", "--train-iters", "10", *SAVE, folder)
    lane.run(teacher_flags(material, "M*M-", *taught, tp=2), nproc=2)
    return folder


@pytest.fixture(scope="module")
def student(material) -> str:
    """A hybrid student after one stock step."""
    folder = str(material.folder / "hybrid-student")
    data = ("--data-path", material.general, "--train-iters", "1", *SPLIT)
    lane.run(student_flags(*data, "--hybrid-layer-pattern", "*E*E", *SAVE, folder))
    return folder


def inject(material, recipe, teacher, start, *extra, nproc=1, check=True, **layout):
    """Three steps with a teacher, from the student ``start``."""
    path = material.folder / "hybrid-teacher.yaml"
    path.write_text(recipe.format(teacher=teacher))
    ours = ("--inject-recipe", str(path), "--inject-verify-frozen", "--train-iters", "3")
    flags = student_flags(*material.blend, *ours, *START, start, **layout)
    run = lane.run([*flags, *extra], nproc=nproc, check=check)
    assert not check or PROVEN.search(run.output), run.tail()
    return run


def test_a_gpt_student_learns_the_same_from_either(material, translated):
    """Block n of the one is layers 2n and 2n + 1 of the other; the last of a block is imitated."""
    layers = "layers: {{2: %d, 3: %d}}"
    source = 'source: "megatron:{teacher}"'
    runs = [
        inject(
            material,
            IMITATING.replace(source, f"{source}, {layers % imitated}"),
            teacher,
            material.student,
        )
        for teacher, imitated in ((material.teacher, (0, 1)), (translated, (1, 3)))
    ]
    lane.same_runs(*runs)
    assert len(set(runs[0].losses("kd loss"))) == 3
    for run, layers in zip(runs, (2, 4), strict=True):
        assert f"megatron: {layers} layers, hidden 48" in run.output


def test_a_hybrid_student_learns_the_same_from_either(material, translated, student):
    pattern = ("--hybrid-layer-pattern", "*E*E")
    runs = [
        inject(material, HYBRID, teacher, student, *pattern)
        for teacher in (material.teacher, translated)
    ]
    for term in ("lm loss", "kd loss"):
        assert runs[0].losses(term) == runs[1].losses(term), term


@pytest.mark.parametrize(
    "layout", ["tp2-sp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "cp2"))]
)
def test_a_teacher_with_mamba_layers_is_whole_at_any_layout(material, mamba, layout):
    """Written at TP 2; its layer 2, of Mamba, is imitated. Run in windows it says the same."""
    source = 'source: "megatron:{teacher}"'
    recipe = IMITATING.replace(source, f"{source}, layers: {{{{3: 2}}}}")
    alone = inject(material, recipe, mamba, material.student)
    at = dict(LAYOUTS[layout])
    run = inject(material, recipe, mamba, material.student, *at.pop("extra"), **at)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(alone.losses(term), rel=2e-5), term
    windows = inject(
        material, RECIPE.replace(source, f"{source}, window: 2"), mamba, material.student
    )
    assert windows.losses("kd loss")[0] == alone.losses("kd loss")[0]
    assert alone.losses("kd loss")[-1] < alone.losses("kd loss")[0]


def test_a_hybrid_teacher_does_not_keep_documents_apart(material, mamba):
    flags = ("--reset-attention-mask",)
    run = inject(material, RECIPE, mamba, material.student, *flags, check=False)
    assert_clean_end(run, ["has layers with a state (M*M-), which goes on"])
