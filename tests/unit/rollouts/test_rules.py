"""What a recipe may say of rollouts."""

import dataclasses

import pytest
import yaml

from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.rollouts.section import folder_of
from tests.harness.recipes import facts, message_of, text_with

OWN = {"domains.0.data": [1, "rollouts:/own"]}
FEATURE = FEATURES["rollouts"]


def recipe_with(changes):
    return recipe_from_yaml(text_with({**OWN, **changes}))


def test_a_folder_is_no_entry_of_the_blend():
    recipe = recipe_with({})
    assert folder_of(recipe.domains[0]) == "/own"
    assert folder_of(recipe.domains[1]) is None
    known = facts(train=("/d/en", "/d/code", "/d/math"))
    assert split_labels(recipe, known, "train") == [-1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domains.0.data": ["rollouts:/own"]}, "domains[0].data[0]: 'rollouts:/own' stands alone"),
        ({"domains.0.data": [1, "rollouts:"]}, "names no folder"),
        ({"domains.0.data": [1, "rollouts:/a", "rollouts:/b"]}, "is a second folder of rollouts"),
        ({"domains.1.data": [2, "rollouts:/own"]}, "is already claimed by domains[0].data[1]"),
        (
            {"domains.1.data": [2, "rollouts:/x/../own/"]},
            "domains[1].data[1]: 'rollouts:/x/../own/' is the folder of domains[0].data[1] too",
        ),
        (
            {"general_data": ["rollouts:/g"]},
            "general_data[0]: 'rollouts:/g' is text that a student",
        ),
        ({"teachers.coder.source": "store:/s"}, "domains[0].teacher: 'coder' is a store"),
        ({"rollouts.every": 0}, "rollouts.every: 0 is no number of steps"),
        ({"rollouts.late": "never"}, "rollouts.late: 'never'"),
        ({"rollouts.patience": 0}, "rollouts.patience: 0"),
        ({"rollouts.max_age": 0}, "rollouts.max_age: 0 is no number of steps"),
        ({"rollouts.stale": "weight"}, "rollouts.stale: 'weight' weighs what is older than no age"),
        (
            {"domains.0.data": [1], "rollouts.every": 3},
            "are about rollouts, of which no domain has any",
        ),
    ],
)
def test_mistakes_are_named(changes, said):
    assert said in message_of(lambda: recipe_with(changes))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dataloader_type", "cyclic"),
        ("dataloader_type", "external"),
        ("reset_position_ids", True),
        ("reset_attention_mask", True),
        ("sft", True),
    ],
)
def test_options_that_leave_no_places_are_refused(option, value):
    known = dataclasses.replace(facts(), options={option: value})
    refusals = FEATURE.refuses
    said = message_of(lambda: [refused.check(recipe_with({}), known) for refused in refusals])
    assert said.startswith("--" + option.replace("_", "-"))
    for refused in refusals:
        refused.check(recipe_with({"domains.0.data": [1]}), known)


def test_parts_of_samples_are_no_samples():
    """Where a rank has a part of each, their means are none of the whole."""
    (refused,) = (r for r in FEATURE.refuses if "per-token" in r.setting)
    known = dataclasses.replace(facts(), options={"context_parallel_size": 2})
    said = message_of(lambda: refused.check(recipe_with({}), known))
    assert said.startswith("--context-parallel-size: takes the mean of each rank's part")
    assert said.endswith("add --calculate-per-token-loss")
    for options in ({"context_parallel_size": 1}, {**known.options, "calculate_per_token_loss": 1}):
        refused.check(recipe_with({}), dataclasses.replace(known, options=options))


def test_mock_data_has_no_places():
    known = dataclasses.replace(facts(), mock_data=True)
    assert "--mock-data" in message_of(lambda: FEATURE.check(recipe_with({}), known))


def test_the_plan_says_what_is_read():
    text = render_plan(Plan(recipe_with({"rollouts": {"max_age": 9, "late": "wait"}})))
    assert "code <- /own" in text
    assert "waited for, 900 s at most" in text
    assert "older than 9 steps: not read" in text
    assert "cross-entropy (beta) on text of the student's own" in text
    quiet = render_plan(Plan(recipe_with({"domains.0.beta": 0.0})))
    assert "text of the student's own" not in quiet


def test_settings_survive_being_written():
    recipe = recipe_with({"rollouts.max_age": 9, "rollouts.stale": "weight"})
    assert recipe_from_yaml(yaml.safe_dump(recipe.plain())).plain() == recipe.plain()
