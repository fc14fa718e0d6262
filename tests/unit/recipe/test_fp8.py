"""What a recipe may keep and run in FP8, by itself and beside its student."""

import dataclasses

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import ParallelFacts, PrecisionFacts
from megatron_moe_inject.recipe.load import recipe_from_flags
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.student import check_recipe, student_facts_from_args
from tests.harness.recipes import facts, recipe

IN_FP8 = PrecisionFacts("e4m3", "blockwise", transformer_engine=True, grouped_gemm=True)
DELAYED = dataclasses.replace(IN_FP8, fp8_recipe="delayed")


def frozen_in_fp8(**train):
    made = recipe()
    made.train = dataclasses.replace(made.train, frozen_experts="fp8", **train)
    return made


def test_frozen_experts_in_fp8(parse):
    check_recipe(frozen_in_fp8(), facts(precision=IN_FP8))
    line = (
        "--num-layers 8 --num-experts 16 --mock-data --fp8-format e4m3 --fp8-recipe blockwise "
        "--transformer-impl transformer_engine --moe-grouped-gemm"
    )
    assert student_facts_from_args(parse(line)).precision == IN_FP8
    assert student_facts_from_args(parse("--num-layers 8 --mock-data")).precision.fp8 is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"fp8": None}, "--fp8-format"),
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe blockwise or tensorwise"),
        ({"transformer_engine": False}, "--transformer-impl transformer_engine"),
        ({"grouped_gemm": False}, "--moe-grouped-gemm"),
    ],
)
def test_what_frozen_experts_in_fp8_need(changes, wanted):
    precision = dataclasses.replace(IN_FP8, **changes)
    with pytest.raises(RecipeError, match=f"train.frozen_experts: 'fp8' needs .*{wanted}"):
        check_recipe(frozen_in_fp8(), facts(precision=precision))


def test_what_published_fp8_weights_need():
    published = frozen_in_fp8(fp8_source="hf:/student")
    check_recipe(published, facts(precision=IN_FP8))
    tensorwise = dataclasses.replace(IN_FP8, fp8_recipe="tensorwise")
    with pytest.raises(RecipeError, match="use --fp8-recipe blockwise"):
        check_recipe(published, facts(precision=tensorwise))
    with pytest.raises(RecipeError, match="--expert-tensor-parallel-size is 2; set it to 1"):
        check_recipe(published, facts(precision=IN_FP8, parallel=ParallelFacts(etp=2)))


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"frozen_experts": "int4"}, "train.frozen_experts: 'int4' is not known"),
        ({"frozen_experts": "fp8", "experts": "all"}, "keeps no expert, since all of them train"),
        ({"fp8_source": "hf:/x"}, "train.fp8_source: 'hf:/x' is used only by experts kept in FP8"),
    ],
)
def test_rules_of_frozen_experts(train, problem):
    made = recipe()
    made.train = dataclasses.replace(made.train, **train)
    with pytest.raises(RecipeError, match=problem):
        check_recipe(made, facts(precision=IN_FP8))


@pytest.mark.parametrize(
    ("source", "own", "problem"),
    [
        ("megatron:/t", {"fp8": "e5m2"}, "teachers.teacher.fp8: 'e5m2' is not known"),
        ("hf:/t", {"fp8": "tensorwise"}, "is not for a teacher of hf"),
        ("megatron:/t", {"fp8": "blockwise", "dtype": "fp32"}, "is not for a teacher of megatron"),
    ],
)
def test_rules_of_teachers_in_fp8(source, own, problem):
    made = recipe_from_flags(data=[1], experts="3:0", teacher=source)
    (name,) = made.teachers
    made.teachers[name] = dataclasses.replace(made.teachers[name], **own)
    with pytest.raises(RecipeError, match=problem):
        check_recipe(made, facts())


def test_the_plan_says_how_frozen_experts_are_kept():
    for train, line in (
        ({}, "frozen experts are kept in FP8 alone, encoded as loaded"),
        ({"fp8_source": "hf:/v3"}, "frozen experts are kept in FP8 alone, from hf:/v3"),
    ):
        assert line in render_plan(Plan(frozen_in_fp8(**train)))
    assert "FP8" not in render_plan(Plan(recipe()))
