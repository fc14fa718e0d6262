"""The teacher gate of runs that begin and of runs that go on, by invented losses."""

import pytest

from megatron_moe_inject.evaluation.gate import judge
from megatron_moe_inject.evaluation.section import EVALUATION, EvaluationSpec
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.recipe.schema import Domain, Recipe
from tests.harness.evaluations import evaluation

CODER, OTHER = {"coder": "megatron:/ckpt/coder"}, {"coder": "megatron:/ckpt/other"}
BEGUN = evaluation({"loss": 3.0, "teacher": 2.0}, teachers=CODER)


def ask(now, asks=True, **options):
    recipe = Recipe([Domain("code", [1], teacher="coder")], {})
    recipe.sections[EVALUATION.key] = EvaluationSpec(gate=asks)
    return judge(now, recipe, **{"begins": False} | options)


def verdict(asks=True):
    return ask(BEGUN, asks, begins=True)[1]


def later(loss=1.5, teacher=2.0, teachers=CODER, **options):
    return evaluation({"loss": loss, "teacher": teacher, **options}, teachers=teachers)


def test_what_passed_is_kept_with_what_it_was_compared_with():
    kept = verdict()
    assert kept["text"] == BEGUN.text()
    assert kept["student"] == {"code": pytest.approx(BEGUN.classes["code"].mean("loss"))}
    assert kept["passed"] == {"code": {"teacher": "coder", "sources": CODER}}


def test_a_student_that_has_learned_more_than_its_teacher_knows_goes_on():
    assert ask(later(), verdict=verdict()) == ([], verdict())


@pytest.mark.parametrize("before", [verdict(), verdict(asks=False)], ids=["passed", "not asked"])
def test_a_teacher_that_has_not_passed_is_compared_with_the_student_as_it_began(before):
    (said,), kept = ask(later(teacher=2.5, teachers=OTHER), verdict=before)
    assert "of the student as its injection began" in said
    assert kept["passed"]["code"]["sources"] == OTHER
    assert kept["student"] == before["student"]
    with pytest.raises(RecipeError, match="does not predict its domain better") as error:
        ask(later(loss=4.0, teacher=3.5, teachers=OTHER), verdict=before)
    assert error.value.key == "domains[0].teacher"


def test_with_the_gate_open_nobody_passes():
    assert verdict(asks=False)["passed"] == {}
    assert ask(later(teachers=OTHER), asks=False, verdict=verdict()) == ([], verdict())


@pytest.mark.parametrize(
    ("before", "now"),
    [(None, later()), (verdict(), later(teachers=OTHER, n=19))],
    ids=["begun unmeasured", "other text"],
)
def test_what_cannot_be_compared_is_said_and_has_not_passed(before, now):
    (said,), kept = ask(now, verdict=before)
    assert "was not measured on this text as its injection began" in said
    assert kept == before


def test_of_an_earlier_version_the_first_line_of_the_list_is_the_verdict():
    assert ask(later(), first=BEGUN) == ([], verdict())
    with pytest.raises(RecipeError, match="as its injection began"):
        ask(later(teacher=3.5, teachers=OTHER), first=BEGUN)


def test_a_domain_without_held_out_text_is_named():
    (said,), kept = ask(evaluation(None, {}), begins=True)
    assert "no held-out text of code" in said
    assert kept["passed"] == {}


@pytest.mark.parametrize("begins", [True, False])
def test_a_teacher_of_which_only_some_ids_are_known_is_not_compared_and_has_not_passed(begins):
    unmeasured = evaluation({"loss": 3.0}, teachers=CODER)
    (said,), kept = ask(unmeasured, begins=begins, verdict=ask(unmeasured, begins=True)[1])
    assert "teacher coder of code is a store of drawn ids, or without the label's" in said
    assert kept["passed"] == {}
