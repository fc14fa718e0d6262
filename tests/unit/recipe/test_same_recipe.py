"""Ranks that would not do the same are told which, in what, and what every one of them has."""

import dataclasses
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.meeting import Meeting
from megatron_moe_inject.recipe.load import recipe_from_flags, recipe_from_yaml
from megatron_moe_inject.recipe.same_recipe import begin_alike, description, judge
from tests.harness.meetings import all_at_once, ranks

TEXT = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {3: [0, 5]}}}
teachers: {coder: {source: "hf:/t"}}
objective: {alpha: {points: {0: 0.0, 9: 1.0}}}
"""


@dataclasses.dataclass
class Info:
    num_layers: int = 4
    vocabulary: str = "the same"


def made(train=(-1, 0), **info):
    return SimpleNamespace(
        describe=lambda: {
            "--data-path (domains of train)": list(train),
            **{
                f"teachers.coder.source ({field})": value
                for field, value in dataclasses.asdict(Info(**info)).items()
            },
        }
    )


def does(text=TEXT, flags=(), **found):
    args = Namespace(inject_recipe="/node/recipe.yaml", inject_set=None, **dict(flags))
    return {"does": description(recipe_from_yaml(text), args, made(**found))}


def test_the_same_passes():
    assert judge({0: does(), 1: does(), 2: does()}, 3) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (does(TEXT.replace("9: 1.0", "9: 0.5")), "objective.alpha.points.9: 0.5 on rank 2, but 1"),
        (does(TEXT.replace("[0, 5]", "[0, 6]")), "domains[0].experts.layers.3: [0, 6] on rank 2"),
        (does(TEXT.replace("3: [", "2: [")), "domains[0].experts.layers.3: nothing on rank 2, but"),
        (does(num_layers=5), "teachers.coder.source (num_layers): 5 on rank 2, but 4 on ranks 0-1"),
        (does(train=(0, -1)), "--data-path (domains of train): [0, -1] on rank 2, but [-1, 0]"),
        (does(flags={"inject_dry_run": True}), "--inject-dry-run: True on rank 2, but nothing on"),
    ],
    ids=["schedule", "experts", "layer", "teacher", "data", "flag"],
)  # fmt: skip
def test_what_differs_is_named_with_its_ranks(other, message):
    said = judge({0: does(), 1: does(), 2: other}, 3)
    assert said["error"].startswith(message)
    assert "every rank needs the same recipe" in said["error"]
    # Of two that differ the first rank is what the others should be.
    assert " on rank 1, but " in judge({0: does(), 1: other}, 2)["error"]


def test_profiles_count_by_their_content():
    """A resolved recipe says where experts come from, with the profile's checksum."""
    recipes = [recipe_from_flags(data=[0], experts="3:0", alpha=0.0, beta=1.0) for _ in range(2)]
    for recipe, checksum in zip(recipes, "ab", strict=True):
        recipe.domains[0].experts.origin = f"token share of p.json (sha256 {checksum})"
    said = [{"does": description(recipe, Namespace(), made())} for recipe in recipes]
    found = judge(dict(enumerate(said)), 2)
    assert found["key"] == "domains[0].experts.origin"


def test_where_a_profile_is_written_is_each_ranks_own_business():
    here, there = ({"inject_profile": f"/node{n}/profile.json"} for n in (0, 1))
    assert judge({0: does(flags=here), 1: does(flags=there)}, 2) is None
    found = judge({0: does(flags=here), 1: does(flags={"inject_profile": None})}, 2)
    assert found["error"].startswith("--inject-profile: False on rank 1, but True on rank 0")


def test_a_mistake_of_some_ranks_is_everybodys():
    wrong = {"error": "--inject-recipe x: cannot be read", "key": None}
    assert judge({0: wrong, 1: wrong}, 2)["error"] == wrong["error"]
    found = judge({0: does(), 1: wrong, 2: wrong, 3: does()}, 4)
    assert found["error"] == f"{wrong['error']} (found on ranks 1-2 of 4)"


def test_ranks_without_an_injection_are_named():
    found = judge({0: does(), 2: does()}, 3)
    assert found["error"].startswith("rank 1 of 3 did not begin an injection in time")


def test_all_ranks_raise_the_same():
    """The first with its recipe, the second with a mistake of its own."""

    def begin(own):
        def make():
            if own.rank:
                raise RecipeError("objective.alpha: -1 is below 0; raise it", "objective.alpha")
            return recipe_from_yaml(TEXT), made()

        args = Namespace(inject_recipe="/r.yaml", inject_set=None)
        with pytest.raises(RecipeError) as caught:
            begin_alike(own, args, make)
        raised.append((str(caught.value), caught.value.key))

    raised = []
    all_at_once(*(lambda own=own: begin(own) for own in ranks(2)))
    message = "/r.yaml: objective.alpha: -1 is below 0; raise it (found on rank 1 of 2)"
    assert raised == [(message, "objective.alpha")] * 2


def test_one_rank_begins_alone():
    run = made()
    args = Namespace(inject_recipe=None, inject_set=None)
    alone = Meeting(None, 0, 1, 1.0)
    assert begin_alike(alone, args, lambda: (recipe_from_yaml(TEXT), run)) is run
