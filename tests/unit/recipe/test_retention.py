"""``retention`` in the recipe file: its fields, its plan and its mistakes."""

import pytest

from megatron_moe_inject.evaluation.report.charts import weights
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.retention.feature import kept_originals
from megatron_moe_inject.retention.section import RETENTION
from tests.harness.recipes import message_of, text_with

RAMP = {"points": {0: 1.0, 9: 0.0}}


def test_weights_and_what_they_keep_twice():
    both = recipe_from_yaml(text_with({"retention": {"experts": RAMP, "l2": 0.1}}))
    assert both[RETENTION].in_use() == ["experts", "l2"]
    assert recipe_from_yaml(dump_recipe(both)) == both
    assert kept_originals(both) is None
    experts = recipe_from_yaml(text_with({"retention": {"experts": 0.1}}))
    assert kept_originals(experts) == ["experts"]
    assert kept_originals(recipe_from_yaml(text_with({}))) == []
    gamma = text_with({"retention": {"experts": 1}, "objective.gamma": 1})
    assert kept_originals(recipe_from_yaml(gamma)) is None


def test_the_plan_and_the_report_show_them():
    recipe = recipe_from_yaml(text_with({"retention": {"experts": RAMP, "l2": 0.1}}))
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
            {"objective.gamma": 1, "retention": {"originals": "host"}},
            {
                "steering": {"retention": 1},
                "train": {"router": True},
                "retention": {"originals": "host"},
            },
        )
    ]
    places = ["kept on the device" in text for text in shown]
    assert places == [False, True, False, False]
    assert ["kept in host memory" in text for text in shown] == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"retention": {"l2": -1}}, ("retention.l2: -1", "is negative")),
        ({"retention": {"expert": 1}}, ("retention.expert", "experts")),
        (
            {"retention": {"originals": "disk"}},
            ("retention.originals: 'disk'", "device", "host"),
        ),
        (
            {"retention": {"originals": "host"}},
            ("retention.originals: 'host'", "no retention is used", "gamma"),
        ),
        (
            {"retention": {"experts": RAMP | {"shape": "step"}}},
            ("retention.experts.shape: 'step'", "linear"),
        ),
        (
            {
                "retention": {"experts": 1},
                "train": {"experts": "none", "router": True},
            },
            ("retention.experts: 1", "none train", "train.experts"),
        ),
    ],
)
def test_mistakes(changes, parts):
    message = message_of(lambda: recipe_from_yaml(text_with(changes)))
    for part in parts:
        assert part in message, message
