"""Recipes with several teachers for one domain: what they mean, and what is wrong with them."""

import pytest

from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.weights import term_weights
from tests.harness.recipes import message_of, text_with

TWO = {
    "domains.0.teacher": {"coder": 3, "prose": 1.0},
    "teachers.prose.source": "hf:/prose",
}


def test_weights_are_normalised_and_come_back():
    recipe = recipe_from_yaml(text_with(TWO))
    code, math = recipe.domains
    assert code.teacher == {"coder": 3.0, "prose": 1.0}
    assert code.teacher_weights == {"coder": 0.75, "prose": 0.25}
    assert math.teacher_weights == {}
    assert math.taught_by is None
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe
    assert recipe.alpha(code) == 0.7


def test_one_teacher_may_be_written_either_way():
    plain, only = (
        recipe_from_yaml(text_with({"domains.0.teacher": teacher})).domains[0]
        for teacher in ("coder", {"coder": 5})
    )
    assert only.teacher_weights == plain.teacher_weights == {"coder": 1.0}
    assert only.taught_by == plain.taught_by == "coder"


def test_overrides_reach_the_teachers():
    set_both = ["domains[0].teacher={coder: 1, prose: 3}", "domains[0].committee=top"]
    (domain, _) = recipe_from_yaml(text_with(TWO), set_both).domains
    assert domain.teacher_weights == {"coder": 0.25, "prose": 0.75}
    assert domain.taught_by == "by top(0.25 coder + 0.75 prose)"
    (domain, _) = recipe_from_yaml(text_with(TWO), ["domains[0].teacher.coder=1"]).domains
    assert domain.teacher_weights == {"coder": 0.5, "prose": 0.5}


def test_the_plan_shows_the_mixture():
    plan = render_plan(Plan(recipe_from_yaml(text_with(TWO | {"domains.0.committee": "label"}))))
    assert "0.7 * 1^2 * forward_kl(by label(0.75 coder + 0.25 prose) || student, T=1)" in plan
    assert "hf:/prose" in plan


def test_the_temperature_is_one():
    both = {"teachers.coder.temperature": 2, "teachers.prose.temperature": 2}
    recipe = recipe_from_yaml(text_with(TWO | both))
    assert term_weights(recipe, 0)[0].temperature == 2.0
    own = {"teachers.coder.temperature": 2, "domains.0.temperature": 3}
    assert recipe_from_yaml(text_with(TWO | own)).temperature(recipe.domains[0]) == 2.0
    recipe = recipe_from_yaml(text_with(TWO | own))
    assert recipe.temperature(recipe.domains[0]) == 3.0


MISTAKES = [
    ({"domains.0.teacher": {}}, ("domains[0].teacher: {} names no teacher", "NAME")),
    ({"domains.0.teacher": {"codr": 1}}, ("domains[0].teacher.codr: 'codr'", "did you mean coder")),
    (
        {"domains.0.teacher": {"coder": 1, "prose": 0}},
        ("domains[0].teacher.prose: 0.0 is not positive", "leave the teacher out"),
    ),
    ({"domains.0.teacher": {"coder": -1}}, ("domains[0].teacher.coder: -1.0 is not positive",)),
    ({"domains.0.teacher": {"coder": "much"}}, ("domains[0].teacher.coder: 'much' is not a",)),
    ({"domains.0.teacher": {"coder": None}}, ("domains[0].teacher.coder: None is not a number",)),
    ({"domains.0.teacher": {"coder": 1}}, ("teachers.prose: 'hf:/prose' is used by no domain",)),
    ({"domains.0.committee": "loud"}, ("domains[0].committee: 'loud'", "fixed, label, top")),
    ({"domains.1.committee": "top"}, ("domains[1].committee: 'top' weighs teachers against",)),
    ({"teachers.prose.temperature": 2}, ("domains[0].temperature: missing", "coder and prose")),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES)
def test_mistakes(changes, words):
    message = message_of(lambda: recipe_from_yaml(text_with(TWO | changes)))
    for word in words:
        assert word in message
