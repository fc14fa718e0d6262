"""The teacher gate of runs that begin and of runs that go on, by invented losses."""

from argparse import Namespace

import pytest

from megatron_moe_inject.metrics.gate import KEPT, TeacherGate
from megatron_moe_inject.recipe import Domain, EvaluationSpec, Recipe
from megatron_moe_inject.typed import RecipeError
from tests.unit.evaluations import evaluation

CODER, OTHER = {"coder": "megatron:/ckpt/coder"}, {"coder": "megatron:/ckpt/other"}
BEGUN = evaluation({"loss": 3.0, "teacher": 2.0}, teachers=CODER)


def gate(asks=True):
    recipe = Recipe([Domain("code", [1], teacher="coder")], {})
    recipe.evaluation = EvaluationSpec(gate=asks)
    return TeacherGate(recipe, Namespace())


def verdict(asks=True):
    begun = gate(asks)
    begun.ask(BEGUN, begins=True)
    return getattr(begun._args, KEPT)


def later(loss=1.5, teacher=2.0, teachers=CODER, **options):
    return evaluation({"loss": loss, "teacher": teacher, **options}, teachers=teachers)


def test_what_passed_is_kept_with_what_it_was_compared_with():
    kept = verdict()
    assert kept["text"] == BEGUN.text()
    assert kept["student"] == {"code": pytest.approx(BEGUN.classes["code"].mean("loss"))}
    assert kept["passed"] == {"code": {"teacher": "coder", "sources": CODER}}


def test_a_student_that_has_learned_more_than_its_teacher_knows_goes_on():
    ours = gate()
    assert ours.ask(later(), begins=False, stored=verdict()) == []
    assert getattr(ours._args, KEPT) == verdict()


@pytest.mark.parametrize("stored", [verdict(), verdict(asks=False)], ids=["passed", "not asked"])
def test_a_teacher_that_has_not_passed_is_compared_with_the_student_as_it_began(stored):
    ours = gate()
    (said,) = ours.ask(later(teacher=2.5, teachers=OTHER), begins=False, stored=stored)
    assert "of the student as its injection began" in said
    assert getattr(ours._args, KEPT)["passed"]["code"]["sources"] == OTHER
    assert getattr(ours._args, KEPT)["student"] == stored["student"]
    with pytest.raises(RecipeError, match="does not predict its domain better") as error:
        gate().ask(later(loss=4.0, teacher=3.5, teachers=OTHER), begins=False, stored=stored)
    assert error.value.key == "domains[0].teacher"


def test_with_the_gate_open_nobody_passes():
    assert verdict(asks=False)["passed"] == {}
    ours = gate(asks=False)
    assert ours.ask(later(teachers=OTHER), begins=False, stored=verdict()) == []
    assert getattr(ours._args, KEPT) == verdict()


@pytest.mark.parametrize(
    ("stored", "now"),
    [(None, later()), (verdict(), later(teachers=OTHER, n=19))],
    ids=["begun unmeasured", "other text"],
)
def test_what_cannot_be_compared_is_said_and_has_not_passed(stored, now):
    ours = gate()
    (said,) = ours.ask(now, begins=False, stored=stored)
    assert "was not measured on this text as its injection began" in said
    assert getattr(ours._args, KEPT) == stored


def test_of_an_earlier_version_the_first_line_of_the_list_is_the_verdict():
    assert gate().ask(later(), begins=False, first=BEGUN) == []
    with pytest.raises(RecipeError, match="as its injection began"):
        gate().ask(later(teacher=3.5, teachers=OTHER), begins=False, first=BEGUN)


def test_a_domain_without_held_out_text_is_named():
    ours = gate()
    (said,) = ours.ask(evaluation(None, {}), begins=True)
    assert "no held-out text of code" in said
    assert getattr(ours._args, KEPT)["passed"] == {}
