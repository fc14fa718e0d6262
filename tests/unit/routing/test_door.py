"""The door of new experts: in a recipe, and in each kind of router."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.open_door import STORED, OpenDoor, door_in, refuse_half_open
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.schedule import Schedule
from megatron_moe_inject.recipe.student import check_options
from megatron_moe_inject.routing.door import Behind, RouterDoor
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


@pytest.mark.parametrize("form", ["file", "object"])
def test_a_checkpoint_says_how_far_it_was_open(tmp_path, form):
    def refuse(args):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with CheckpointWriter(folder) as writer:
            writer.tensor(["weight"], (2,), (), torch.ones(2))
            writer.finish({"args": args, "iteration": 0})
        if form == "object":
            (folder / "common.pt").unlink()
        place = CheckpointPlace("CKPT", folder)
        refuse_half_open(place.open(), place.error)

    door = OpenDoor(0.25, {3: [8, 9]})
    half = Namespace(**{STORED: door.plain()})
    assert door_in(half, "CKPT") == door
    assert "was at 0.25" in message_of(lambda: refuse(half))
    for whole in (None, Namespace(), Namespace(**{STORED: OpenDoor(1.0, {}).plain()})):
        refuse(whole)
    damaged = Namespace(**{STORED: {"open": "wide"}})
    assert "cannot be" in message_of(lambda: door_in(damaged, "CKPT"))


OLD, NEW = (0, 1, 3, 4), (2, 5)
"""Two groups of two old experts, each with a new one at its end."""
KINDS = {
    "softmax": {"score_function": "softmax"},
    "softmax before the choice": {"score_function": "softmax", "use_pre_softmax": True},
    "sigmoid, groups and bias": {"score_function": "sigmoid", "num_groups": 2, "group_topk": 1},
    "square root of softplus": {"score_function": "sqrtsoftplus"},
}


class Router(torch.nn.Module):
    """What the door needs of Megatron's ``TopKRouter``, which chooses by Megatron's function."""

    def __init__(self, experts, bias, **kind):
        super().__init__()
        self.config = SimpleNamespace(
            num_moe_experts=experts, moe_router_score_function=kind["score_function"]
        )
        self.weight, self.bias = torch.nn.Parameter(torch.zeros(experts, 4)), None
        self.register_buffer("expert_bias", bias)
        self.local_tokens_per_expert = None if bias is None else torch.zeros(experts)
        self._kind = kind

    def routing(self, logits, padding_mask=None):
        gates, chosen = topk_routing_with_score_function(
            logits.view(-1, logits.shape[-1]), 2, expert_bias=self.expert_bias, **self._kind
        )
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert += chosen.sum(0)
        return gates, chosen


def routers_of(kind):
    """Without and with new experts, which the second has closed; and its door."""
    torch.manual_seed(0)
    biased = kind["score_function"] != "softmax"
    bias = torch.randn(4) if biased else None
    base = Router(4, bias, **kind)
    grown_bias = torch.full((6,), -1e4) if biased else None
    if biased:
        grown_bias[list(OLD)] = bias
    grown = Router(6, grown_bias, **kind)
    door = RouterDoor(grown, Behind(NEW, OLD, donors=(0, 4)), unlock=True)
    grown.load_state_dict(grown.state_dict())
    return base, grown, door


@pytest.mark.parametrize("kind", KINDS)
def test_shut_a_router_is_the_one_without_them(kind):
    base, grown, door = routers_of(KINDS[kind])
    logits = torch.randn(64, 1, 6)
    logits[..., list(NEW)] += 5  # their own would be chosen at once
    logits.requires_grad_()
    before, chosen_before = base.routing(logits[..., list(OLD)])
    door.set(0)
    gates, chosen = grown.routing(logits)
    assert not chosen[:, list(NEW)].any()
    assert torch.equal(chosen[:, list(OLD)], chosen_before)
    torch.testing.assert_close(gates[:, list(OLD)], before, rtol=0, atol=1e-6)
    (gates**2).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_to_the_router_that_is_stored(kind):
    _, grown, door = routers_of(KINDS[kind])
    if grown.expert_bias is not None:  # what closed them is gone
        assert torch.equal(grown.expert_bias[list(NEW)], grown.expert_bias[[0, 4]])
    logits, shares = torch.randn(512, 1, 6), []
    stored = grown.routing.__wrapped__(logits)
    for value in (0.01, 0.2, 0.6, 0.9, 1.0):
        door.set(value)
        shares.append(float(grown.routing(logits)[1][:, list(NEW)].float().mean()))
    assert shares == sorted(shares)
    assert shares[0] < 0.05 < shares[-1]
    for ours, theirs in zip(grown.routing(logits), stored, strict=True):
        assert torch.equal(ours, theirs)


def test_while_it_opens_old_experts_are_balanced_among_themselves():
    _, grown, door = routers_of(KINDS["sigmoid, groups and bias"])
    door.set(0.3)
    door.hold()
    before = grown.expert_bias.clone()
    grown.routing(torch.randn(64, 1, 6))
    counts = grown.local_tokens_per_expert
    assert torch.equal(counts[list(NEW)], counts[list(OLD)].mean().expand(2))
    grown.expert_bias += 0.1  # Megatron's update
    door.restore()
    assert torch.equal(grown.expert_bias[list(NEW)], before[list(NEW)])
    torch.testing.assert_close(grown.expert_bias[list(OLD)], before[list(OLD)] + 0.1)
    door.set(1)
    door.hold()
    grown.expert_bias += 0.1
    door.restore()
    assert (grown.expert_bias[list(NEW)] > before[list(NEW)]).all()
