"""Two teachers for one domain through the real ``pretrain()``."""

import pytest

from tests.harness import lane
from tests.harness.evaluating import assert_same, evaluate
from tests.harness.injection import LAYOUTS, PROVEN, RECIPE, TERMS, inject

NAMES = 'coder: {{source: "megatron:{teacher}"}}'
TWINS = RECIPE.replace("teacher: coder", "teacher: {{coder: 0.2, twin: 0.8}}").replace(
    NAMES, NAMES + '\n  twin: {{source: "megatron:{teacher}"}}'
)


@pytest.fixture(scope="module")
def prose(material) -> str:
    """Another teacher: narrower than the first, and trained on general text."""
    path = str(material.folder / "prose")
    flags = [flag for flag in lane.dense() if flag != "--mock-data"]
    sizes = "--hidden-size 24 --ffn-hidden-size 32 --vocab-size 61 --make-vocab-size-divisible-by 8"
    lane.run(
        [
            *(*flags, *sizes.split(), "--lr", "1e-2", "--train-iters", "20", *lane.ONE_BATCH),
            *(
                "--data-path",
                material.general,
                "--split",
                "90,5,5",
                "--seed",
                "5",
                "--eval-iters",
                "0",
            ),
            *("--save", path, "--save-interval", "100"),
        ]
    )
    return path


def _two(prose: str, by: str = "fixed") -> str:
    text = RECIPE.replace(
        "teacher: coder", f"teacher: {{{{coder: 7, prose: 3}}}}\n    committee: {by}"
    )
    return text.replace(NAMES, NAMES + f'\n  prose: {{{{source: "megatron:{prose}"}}}}')


def test_the_same_teacher_twice_is_that_teacher(material):
    one, twins = inject(material), inject(material, TWINS)
    for term in TERMS:
        assert twins.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


@pytest.mark.slow
def test_two_teachers_give_one_curve_by_window_and_layout(material, prose):
    recipe = _two(prose, "top")
    one = inject(material, recipe)
    windowed = inject(material, recipe, extra=("--inject-set", "teachers.prose.window=1"))
    assert windowed.losses("kd loss") == pytest.approx(one.losses("kd loss"), rel=2e-5)
    for layout in (dict(ep=2), dict(tp=2), dict(pp=2)):
        run = inject(material, recipe, nproc=2, **layout)
        assert PROVEN.search(run.output)
        for term in TERMS:
            assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), (layout, term)


STEERED_BY_BOTH = (
    "imitation: {{hidden: 0.5}}\nobjective: {{",
    "steering: {{coeff: 0.5, confidence: top}}\ntrain: {{router: true}}\n",
)


def _steered_by_both(prose: str) -> str:
    imitation, steering = STEERED_BY_BOTH
    return _two(prose, "label").replace("objective: {{", imitation) + steering


@pytest.fixture(scope="module")
def both(material, prose):
    return inject(material, _steered_by_both(prose))


def test_confidence_steers_and_leaves_imitation_as_it_is(material, prose, both):
    """The confidence is the mixture's; the layers of each teacher are imitated."""
    recipe = _steered_by_both(prose).replace("confidence: top", "confidence: none")
    plain = inject(material, recipe)
    assert both.losses("steering loss")[0] != plain.losses("steering loss")[0]
    assert both.losses("imitation loss")[0] == plain.losses("imitation loss")[0] > 0


@pytest.mark.parametrize(
    "layout",
    ["tp2-sp", *(pytest.param(at, marks=pytest.mark.slow) for at in ("pp2", "cp2", "pp2-vpp2"))],
)
def test_steering_and_imitation_take_both_teachers(material, prose, both, layout):
    """Their confidence is sliced with the sequence, and reaches the chunks of every stage."""
    run = inject(material, _steered_by_both(prose), **LAYOUTS[layout])
    assert PROVEN.search(run.output)
    for term in (*TERMS, "imitation loss", "steering loss"):
        assert run.losses(term) == pytest.approx(both.losses(term), rel=2e-5, abs=1e-6), term


def test_the_mixture_lies_between_its_teachers(material, prose):
    """KL is convex: a mixture is no further from the student than its teachers are on average."""
    start = ("--train-iters", "1")
    ends = [f"domains[0].teacher={{coder: {c}, prose: {p}}}" for c, p in ((1, 1e-9), (1e-9, 1))]
    coder, other = (
        inject(material, _two(prose), extra=(*start, "--inject-set", end)).losses("kd loss")[0]
        for end in ends
    )
    mixed = inject(material, _two(prose), extra=start).losses("kd loss")[0]
    assert abs(coder - other) > 0.01 * coder
    assert mixed < 0.999 * (0.7 * coder + 0.3 * other)


def test_evaluation_measures_the_mixture_without_the_label(material, prose, tmp_path):
    fixed = evaluate(material, tmp_path / "fixed.json", recipe=_two(prose))
    label = evaluate(material, tmp_path / "label.json", recipe=_two(prose, "label"), nproc=2, tp=2)
    assert fixed.classes["code"].teacher == "0.7 coder + 0.3 prose"
    assert label.classes["code"].teacher == "by label(0.7 coder + 0.3 prose)"
    assert_same(label, fixed)
    alone = evaluate(material, tmp_path / "alone.json").classes["code"]
    assert fixed.classes["code"].mean("teacher_loss") != alone.mean("teacher_loss")
