"""Feature imitation in the recipe file: its fields and its mistakes."""

import pytest

from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.teachers.imitation.section import IMITATION
from tests.harness.recipes import message_of, text_with


def test_features_and_their_layers():
    recipe = recipe_from_yaml(
        text_with(
            {
                "imitation": {"hidden": 0.1, "experts": {"points": {0: 0, 9: 1}}},
                "teachers.coder.layers": {3: 1},
            }
        )
    )
    assert recipe[IMITATION].in_use() == ["hidden", "experts"]
    assert recipe[IMITATION].loss == "normalized"
    assert recipe.teachers["coder"].layers == {3: 1}
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe
    assert recipe_from_yaml(text_with({}))[IMITATION].in_use() == []


FEATURE_MISTAKES = [
    ({"imitation.loss": "l2"}, ("imitation.loss: 'l2' is not known", "mse")),
    ({"imitation.hidden": -1}, ("imitation.hidden: -1", "is negative")),
    ({"imitation.hiden": 1}, ("imitation.hiden", "hidden")),
    ({"teachers.coder.layers": {3: 1}}, ("teachers.coder.layers", "nothing imitates", "above 0")),
    (
        {"imitation.hidden": 1, "teachers.coder.layers": {3: -1}},
        ("teachers.coder.layers.3: -1", "count from 0"),
    ),
    (
        {"imitation.hidden": 1, "teachers.coder.window": 2},
        ("teachers.coder.window: 2", "write 0"),
    ),
    (
        {
            "objective": {"alpha": 0, "beta": 1},
            "imitation": {"hidden": 1},
            "domains.0.teacher": ...,
            "teachers": {},
        },
        ("imitation.hidden: 1", "no domain has a teacher"),
    ),
    (
        {
            "imitation.experts": 1,
            "domains.0.experts": {"layers": {}},
            "train": {"experts": "all"},
        },
        (
            "domains[0].experts.layers",
            "no experts to imitate coder",
            "set imitation.experts",
        ),
    ),
]


@pytest.mark.parametrize(("changes", "parts"), FEATURE_MISTAKES)
def test_mistakes_about_features(changes, parts):
    message = message_of(lambda: recipe_from_yaml(text_with(changes)))
    assert all(part in message for part in parts), message
