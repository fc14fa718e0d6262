"""Recipes that name new experts, or old ids, against the card in the student's checkpoint."""

import json

import pytest

from megatron_moe_inject.experts.choose.choice import resolve_experts
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.experts.grow.add import Asked, add_experts
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.new_experts import card_in
from megatron_moe_inject.recipe.expert_choice import ExpertChoice
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.rules import validate
from tests.harness.checkpoints import load_arguments
from tests.harness.profiles import from_counts
from tests.harness.stored_moe import write_moe

GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """4 experts in two groups and two new ones in each, for two domains; in layers 0 and 2."""
    folder = tmp_path_factory.mktemp("grown")
    base = write_moe(folder / "base", **GROUPS)
    asked = Asked(per_layer=4, layers=[0, 2], domains=["code", "law"])
    place = CheckpointPlace("CKPT", base)
    add_experts(place, folder / "grown", asked, progress=lambda items, total: items)
    return folder / "grown"


def facts(load, experts=8):
    return StudentFacts(
        num_layers=3,
        num_moe_experts=experts,
        router_topk=2,
        moe_layers=(0, 1, 2),
        options=vars(load_arguments(load, num_experts=experts)),
        data_paths={"train": ("/d/en", "/d/code")},
    )


def recipe(**choice):
    text = {"domains": [{"name": "code", "data": [1], "experts": choice}],
            "objective": {"alpha": 0, "beta": 1}}  # fmt: skip
    loaded = recipe_from_yaml(json.dumps(text))
    validate(loaded)
    return loaded


def resolved(load, experts=8, **choice):
    return resolve_experts(recipe(**choice), facts(load, experts)).domains[0].experts


def test_new_experts_by_name(grown):
    assert resolved(grown, new="all") == ExpertChoice(
        {0: [2, 3, 6, 7], 2: [2, 3, 6, 7]}, origin="the checkpoint's new experts"
    )
    assert resolved(grown, new="law", only_layers=[2]) == ExpertChoice(
        {2: [3, 7]}, origin="the checkpoint's new experts for law"
    )


def test_old_ids_are_moved(grown):
    choice = resolved(grown, layers={"1": [0, 2, 3]}, numbering="old")
    assert choice == ExpertChoice({1: [0, 4, 5]})
    assert resolved(grown, layers={"1": [0, 2]}, numbering="new") == ExpertChoice({1: [0, 2]})
    assert resolved(grown, layers={"1": [0, 2]}) == ExpertChoice({1: [0, 2]})


def test_a_profile_of_the_base_is_read_through(grown, tmp_path):
    counts = [[2, 4, 20, 14], [10, 2, 8, 20], [4, 8, 8, 20]]
    path = str(tmp_path / "p.json")
    write_profile(path, from_counts(counts, topk=2))
    choice = resolved(grown, profile=path, method="top_n", n=1)
    assert choice.layers == {0: [4], 1: [5], 2: [5]}


def message_of(call):
    with pytest.raises(RecipeError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_say_what_there_is(grown, tmp_path):
    base = grown.parent / "base"
    found = message_of(lambda: resolved(grown, experts=4, new="all"))
    assert "--num-experts: 4 is not what" in found
    assert "pass --num-experts 8" in found
    path = "domains[0].experts"
    for choice, load, message in (
        ({"new": "all"}, base, f"{path}.new: all names new experts, but the student's checkpoint"),
        ({"new": "cod"}, grown, f"{path}.new: 'cod' is no domain that new experts were added for; "
         "did you mean code?"),
        ({"new": "all", "only_layers": [1]}, grown, f"{path}.only_layers: 1 got no new experts"),
        ({"layers": {"0": [1]}, "numbering": "old"}, base, f"{path}.numbering: old is what ids"),
        ({"layers": {"0": [5]}, "numbering": "old"}, grown, "old ids are 0 to 3"),
        ({"new": "all", "layers": {"0": [1]}}, grown, f"{path}.layers: {{0: [1]}} stands beside"),
        ({"new": "a b"}, grown, f"{path}.new: 'a b' is no name"),
        ({"new": "all", "numbering": "old"}, grown, f"{path}.numbering: 'old' is of layers"),
        ({"layers": {"0": [1]}, "numbering": "both"}, grown, f"{path}.numbering: 'both'"),
    ):  # fmt: skip
        found = message_of(lambda choice=choice, load=load: resolved(load, **choice))
        assert message in found, (choice, found)


def test_a_plan_without_flags_says_what_is_missing():
    text = render_plan(Plan(resolve_experts(recipe(new="all"))))
    assert "code: still to be chosen by the checkpoint's new experts" in text
    assert "the new experts of code are known once the student's checkpoint is" in text


def test_a_card_reads_in_the_layers_of_a_hybrid_model(grown):
    card = card_in(CheckpointPlace("CKPT", grown).open().args, "here")
    pattern = LayerPattern("*E*EM*E")
    hybrid = card.in_layers_of(pattern)
    assert (sorted(hybrid.new), hybrid.filled, hybrid.layers) == ([1, 6], [3], "*E*EM*E")
    assert hybrid.in_layers_of(None) == card
    assert hybrid.in_layers_of(pattern) == hybrid
    assert "this student has EE*" in message_of(lambda: card.in_layers_of(LayerPattern("EE*")))
    assert "are in layers of *E*EM*E" in message_of(
        lambda: hybrid.in_layers_of(LayerPattern("*E*E*E"))
    )
