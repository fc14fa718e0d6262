"""The door of new experts in a recipe: what it may be, and what it does not go with."""

from argparse import Namespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.open_door import STORED, OpenDoor, door_in, refuse_half_open
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.schedule import Schedule
from megatron_moe_inject.recipe.student import check_options
from megatron_moe_inject.routing.door_part import late
from megatron_moe_inject.routing.section import ROUTING
from tests.harness.recipes import facts, message_of, text_with


def with_door(opened):
    return recipe_from_yaml(text_with({"routing": {"open": opened}}))


@pytest.mark.parametrize("opened", [1, 1.0, {"points": {0: 0.0, 100: 1.0}}, {"points": {5: 1}}])
def test_a_door_ends_open(opened):
    assert with_door(opened)[ROUTING].open is not None


@pytest.mark.parametrize(
    ("opened", "says"),
    [
        (0.5, "ends at 0.5, so that no checkpoint would be what it was trained as"),
        ({"points": {0: 1.0, 9: 0.9}}, "ends at 0.9"),
        ({"points": {0: 2.0, 9: 1.0}}, "2.0 is above 1"),
        ({"points": {0: -0.1, 9: 1.0}}, "-0.1 is negative"),
        ({"points": {}}, "is empty"),
    ],
)
def test_another_is_a_mistake(opened, says):
    message = message_of(lambda: with_door(opened))
    assert message.startswith("routing.open")
    assert says in message


@pytest.mark.parametrize(
    "options",
    [
        {"moe_expert_capacity_factor": 1.0},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"cuda_graph_impl": "local"},
    ],
)
def test_options_that_it_does_not_go_with(options):
    recipe = with_door({"points": {0: 0.0, 9: 1.0}})
    message = message_of(lambda: check_options(recipe, facts(options=options)))
    assert "remove routing.open" in message


def test_training_that_ends_before_it_is_open_is_a_remark():
    opened = Schedule({0: 0.0, 100: 1.0})
    assert late(opened, Namespace(train_iters=100)) == []
    assert late(opened, Namespace()) == []
    (remark,) = late(opened, Namespace(train_iters=50))
    assert "at 0.5 when training ends" in remark


def test_a_checkpoint_says_how_far_it_was_open():
    def error(problem, remedy):
        return RecipeError(f"CKPT {problem}; {remedy}")

    door = OpenDoor(0.25, {3: [8, 9]})
    half = Namespace(**{STORED: door.plain()})
    assert door_in(half, "CKPT") == door
    assert "was at 0.25" in message_of(lambda: refuse_half_open(half, error))
    for whole in (None, Namespace(), Namespace(**{STORED: OpenDoor(1.0, {}).plain()})):
        refuse_half_open(whole, error)
    damaged = Namespace(**{STORED: {"open": "wide"}})
    assert "cannot be" in message_of(lambda: door_in(damaged, "CKPT"))
