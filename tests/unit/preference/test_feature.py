"""The rules of ``objective.preference``, and what a plan says of it."""

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.student import check_recipe
from megatron_moe_inject.retention.feature import kept_originals

BLEND = ("text", "code", "pairs")
HELD_OUT = ("text_held_out", "code_held_out")


def recipe(preference="{data: [2]}", *, teacher="coder", teachers="", mixing="{preference: 0.25}"):
    taught = f", teacher: {teacher}" if teacher else ""
    own = "coder: {source: 'hf:/coder'}, " if teacher else ""
    return recipe_from_yaml(
        f"domains: [{{name: code, data: [1]{taught}}}]\n"
        f"teachers: {{{own}{teachers}}}\n"
        f"objective: {{alpha: {int(bool(teacher))}, beta: 1, preference: {preference}}}\n"
        f"train: {{experts: all}}\nmixing: {mixing}\n"
    )


def facts(valid=HELD_OUT, **options):
    paths = {"train": BLEND, **({"valid": valid} if valid else {})}
    return StudentFacts(num_layers=4, num_moe_experts=4, data_paths=paths, options=options)


def test_a_good_one_and_its_plan():
    made = recipe()
    check_recipe(made, facts(eval_iters=4))
    plan = render_plan(Plan(made, facts()))
    assert "DPO(chosen > rejected, beta=0.1, against the original)" in plan
    assert "pairs of answers: 2" in plan
    assert kept_originals(made) is None
    against = recipe("{data: [pairs], reference: teacher, length_normalised: true, sft: 0.5}")
    check_recipe(against, facts(eval_iters=4))
    plan = render_plan(Plan(against, facts()))
    assert (
        "DPO(chosen > rejected for each token, beta=0.1, against coder) + 0.5 * CE(chosen)" in plan
    )
    assert against.reference_teacher() == "coder"
    assert kept_originals(against) == []


def test_a_teacher_for_pairs_alone():
    made = recipe(
        "{data: [2], reference: teacher, teacher: judge}", teachers="judge: {source: 'hf:/judge'}"
    )
    check_recipe(made, facts())
    assert made.reference_teacher() == "judge"


@pytest.mark.parametrize(
    ("preference", "more", "says"),
    [
        ("{}", {}, "objective.preference.data: missing"),
        ("{data: []}", {}, "objective.preference.data: [] is empty"),
        ("{data: [1]}", {}, "objective.preference.data[0]: 1 is already claimed by"),
        ("{data: [2], beta: 0}", {}, "objective.preference.beta: 0"),
        ("{data: [2], beta: -0.1}", {}, "objective.preference.beta: -0.1"),
        ("{data: [2], label_smoothing: 0.5}", {}, "objective.preference.label_smoothing: 0.5"),
        ("{data: [2], reference: base}", {}, "objective.preference.reference"),
        ("{data: [2], coeff: 0}", {}, "objective.preference.coeff: 0"),
        ("{data: [2], coeff: -1}", {}, "objective.preference.coeff: -1"),
        ("{data: [2], teacher: coder}", {}, "objective.preference.teacher: 'coder' stands beside"),
        ("{data: [2], reference: teacher}", {"teacher": None}, "the recipe has no teacher"),
        (
            "{data: [2], reference: teacher}",
            {"teachers": "judge: {source: 'hf:/judge'}", "teacher": "{coder: 1, judge: 1}"},
            "objective.preference.teacher: missing",
        ),
        (
            "{data: [2], reference: teacher, teacher: codr}", {},
            "objective.preference.teacher: 'codr' is no teacher",
        ),
        (
            "{data: [2], reference: teacher, teacher: judge}",
            {"teachers": "judge: {source: 'hf:/judge', window: 1}"},
            "teachers.judge.window: 1",
        ),
        ("{data: [2]}", {"mixing": "{general: 0.2}"}, "mixing.preference: missing"),
    ],
)  # fmt: skip
def test_mistakes(preference, more, says):
    with pytest.raises(RecipeError) as caught:
        recipe(preference, **more)
    assert says in str(caught.value)


def test_the_name_of_pairs_is_taken():
    with pytest.raises(RecipeError, match="is already the name of pairs of answers"):
        recipe_from_yaml(
            "domains: [{name: preference, data: [1]}]\nobjective: {alpha: 0, beta: 1, "
            "preference: {data: [2]}}\ntrain: {experts: all}\nmixing: {preference: 0.5}\n"
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sft", True),
        ("mtp_num_layers", 1),
        ("qk_clip", True),
        ("dataloader_type", "cyclic"),
    ],
)
def test_options_that_are_refused(option, value):
    with pytest.raises(RecipeError, match=f"--{option.replace('_', '-')}"):
        check_recipe(recipe(), facts(**{option: value}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(valid=BLEND, data_path=list(BLEND)), "is in the valid data, too"),
        (dict(valid=("pairs",)), "is all of the validation data"),
    ],
)
def test_where_held_out_pairs_are_not_found(given, says):
    with pytest.raises(RecipeError, match=says):
        check_recipe(recipe(), facts(**given, eval_iters=2))
    check_recipe(recipe(), facts(**given, eval_iters=0))


def test_held_out_pairs_stand_among_the_validation_data():
    check_recipe(recipe(), facts(valid=BLEND, eval_iters=2))
    check_recipe(recipe(), facts(valid=(*HELD_OUT, "pairs_held_out"), eval_iters=2))
