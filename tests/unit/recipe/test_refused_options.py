"""Megatron options that would move what is frozen, or be left out where the loss stands in."""

from argparse import Namespace

from megatron_moe_inject.recipe.student import check_recipe
from tests.harness.recipes import facts, message_of, recipe


def test_weights_in_parts_are_refused():
    """Megatron derives the number when it checks its flags; 1 is as good as none."""
    whole = Namespace(gtp_weight_remat_size=1, expert_gtp_weight_remat_size=1)
    check_recipe(recipe(1), facts(options=vars(whole)))
    for name, flag in (
        ("gtp_weight_remat_size", "--tensor-parallel-num-weight-shards"),
        ("expert_gtp_weight_remat_size", "--expert-tensor-parallel-num-weight-shards"),
    ):
        found = facts(options={name: 2})
        message = message_of(lambda found=found: check_recipe(recipe(1), found))
        assert message.startswith(f"{flag}: stores each weight in parts")


def test_clipping_is_for_attention_that_trains_whole():
    """It changes weights behind the optimizer, and counts what the original's attention does."""
    found = facts(options={"qk_clip": True})
    parts = ["train.layers=[0,1,2,3,4,5,6]", "train.patterns=['*self_attention*']"]
    for overrides in ([], parts):
        made = recipe(1, overrides=overrides)
        message = message_of(lambda made=made: check_recipe(made, found))
        assert message.startswith("--qk-clip: changes the weights of attention after the optim")
        assert message.endswith("remove it, or set train.attention: true")
    everywhere = "train.layers=[0,1,2,3,4,5,6,7]"
    for whole in ("train.attention=true", everywhere):
        check_recipe(recipe(1, overrides=[whole]), found)
        retained = recipe(1, overrides=[whole], gamma=1.0)
        message = message_of(lambda made=retained: check_recipe(made, found))
        assert message.endswith("remove it, or set objective.gamma to 0")
