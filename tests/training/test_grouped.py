"""Grouped experts, frozen in part, through the real ``pretrain()``.

Transformer Engine's grouped GEMM needs a GPU, so a stand-in with its rules
(``tests/harness/grouped_linear.py``) takes its place inside Megatron's own ``TEGroupedMLP``. The
reference is the same training with one module per expert.
"""

import pytest

from tests.harness import lane
from tests.harness.grouped import GROUPED, SCRIPT, TWO_OF_FOUR, grouped
from tests.harness.injection import LAYOUTS, PROVEN, RECIPE, TERMS, inject, recipe_file
from tests.harness.material import student_flags


@pytest.fixture(scope="module")
def sequential(material):
    return inject(material, TWO_OF_FOUR)


@pytest.mark.parametrize(
    "layout",
    [
        None,
        "ep2, distributed optimizer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "selective recompute")),
    ],
)
def test_the_curve_is_that_of_one_module_per_expert(material, sequential, layout):
    sizes = dict(LAYOUTS[layout]) if layout else {}
    run = grouped(material, *sizes.pop("extra", ()), **sizes)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(sequential.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)


def test_one_layer_of_an_expert_by_pattern(material):
    one = TWO_OF_FOUR.replace(
        "objective:",
        "train: {{experts: none, patterns: ['*.2.mlp.experts.3.linear_fc2.*']}}\nobjective:",
    )
    run, reference = grouped(material, recipe=one), inject(material, one)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(reference.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)


def test_flags_alone_would_train_nothing(material):
    """The stand-in, like the original, asks the first weight alone."""
    first_frozen = RECIPE  # expert 3 of 4, so that weight 0 is frozen
    ours = grouped(material, recipe=first_frozen)
    plain = inject(material, first_frozen)
    assert ours.losses("lm loss")[-1] == pytest.approx(plain.losses("lm loss")[-1], rel=2e-5)
    stock = lane.run(
        material.flags(*("--inject-recipe", recipe_file(material, first_frozen)), *GROUPED),
        script=SCRIPT,
        env={"TESTS_STOCK_GROUPS": "1"},
    )
    assert stock.losses("lm loss")[-1] != pytest.approx(plain.losses("lm loss")[-1], rel=1e-3)


@pytest.mark.slow
def test_checkpoints_are_exchangeable_with_one_module_per_expert(material, tmp_path):
    """Saved in groups and resumed one by one, and the other way round, optimizer included."""
    recipe = ("--inject-recipe", recipe_file(material, TWO_OF_FOUR))
    whole = inject(material, TWO_OF_FOUR, nproc=2, ep=2, extra=("--train-iters", "6"))
    kinds = {"one by one": ((), lane.PRETRAIN), "in groups": (GROUPED, SCRIPT)}
    for first, then in (("in groups", "one by one"), ("one by one", "in groups")):
        save = str(tmp_path / first.replace(" ", "-"))
        keep = ("--train-iters", "6", "--save", save, "--save-interval", "3")
        flags, script = kinds[first]
        lane.run(
            material.flags(*recipe, *flags, *keep, "--exit-interval", "3", ep=2),
            nproc=2,
            script=script,
        )
        flags, script = kinds[then]
        on = student_flags(*material.blend, *recipe, *flags, *keep, "--load", save, ep=2)
        resumed = lane.run(on, nproc=2, script=script)
        for term in TERMS:
            assert resumed.losses(term) == pytest.approx(whole.losses(term)[3:], rel=2e-5), term
