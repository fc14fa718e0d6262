"""``objective.retention`` in the recipe file: its fields, its plan and its mistakes."""

import pytest

from megatron_moe_inject.evaluation.report.charts import weights
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.retention.setup import kept_components
from tests.harness.recipes import message_of, text_with

RAMP = {"points": {0: 1.0, 9: 0.0}}


def test_weights_and_what_they_keep_twice():
    both = recipe_from_yaml(text_with({"objective.retention": {"experts": RAMP, "l2": 0.1}}))
    assert both.objective.retention.in_use() == ["experts", "l2"]
    assert recipe_from_yaml(dump_recipe(both)) == both
    assert kept_components(both) is None
    experts = recipe_from_yaml(text_with({"objective.retention": {"experts": 0.1}}))
    assert kept_components(experts) == ["experts"]
    assert kept_components(recipe_from_yaml(text_with({}))) == []
    gamma = text_with({"objective.retention": {"experts": 1}, "objective.gamma": 1})
    assert kept_components(recipe_from_yaml(gamma)) is None


def test_the_plan_and_the_report_show_them():
    recipe = recipe_from_yaml(text_with({"objective.retention": {"experts": RAMP, "l2": 0.1}}))
    shown = " ".join(render_plan(Plan(recipe)).split())
    assert "linear(0: 1, 9: 0) * change of trained experts' outputs" in shown
    assert "0.1 / 2 * |parameters - start|^2" in shown
    assert {"retention.experts", "retention.l2"} <= set(weights(recipe))


def test_where_the_originals_are_is_in_the_plan():
    shown = [
        render_plan(Plan(recipe_from_yaml(text_with(change))))
        for change in (
            {},
            {"objective.gamma": 1},
            {"objective.gamma": 1, "objective.retention": {"originals": "host"}},
            {
                "steering": {"retention": 1},
                "train": {"router": True},
                "objective.retention": {"originals": "host"},
            },
        )
    ]
    places = ["kept on the device" in text for text in shown]
    assert places == [False, True, False, False]
    assert ["kept in host memory" in text for text in shown] == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"objective.retention": {"l2": -1}}, ("objective.retention.l2: -1", "is negative")),
        ({"objective.retention": {"expert": 1}}, ("objective.retention.expert", "experts")),
        (
            {"objective.retention": {"originals": "disk"}},
            ("objective.retention.originals: 'disk'", "device", "host"),
        ),
        (
            {"objective.retention": {"originals": "host"}},
            ("objective.retention.originals: 'host'", "no retention is used", "gamma"),
        ),
        (
            {"objective.retention": {"experts": RAMP | {"shape": "step"}}},
            ("objective.retention.experts.shape: 'step'", "linear"),
        ),
        (
            {
                "objective.retention": {"experts": 1},
                "train": {"experts": "none", "router": True},
            },
            ("objective.retention.experts: 1", "none train", "train.experts"),
        ),
    ],
)
def test_mistakes(changes, parts):
    message = message_of(lambda: recipe_from_yaml(text_with(changes)))
    for part in parts:
        assert part in message, message
