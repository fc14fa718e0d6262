"""From the recipe to terms: default layers, several teachers, experts of their own."""

import json

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.imitation.terms import ImitationTerm, imitation_terms


def recipe(domains, features, **teachers):
    named = {
        name: {"source": "hf:/t", **({"layers": layers} if layers else {})}
        for name, layers in teachers.items()
    }
    plain = [
        {"name": f"d{i}", "data": [i], "teacher": teacher, "experts": {"layers": layers}}
        for i, (teacher, layers) in enumerate(domains)
    ]
    train = {"experts": "selected" if all(layers for _, layers in domains) else "all"}
    tree = {"domains": plain, "teachers": named, "objective": {"features": features}}
    return recipe_from_yaml(json.dumps(tree | {"train": train}))


def test_without_weights_there_are_none():
    assert imitation_terms(recipe([("a", {1: [0]})], {}, a=None), {"a": 4}, 8) == []


def test_hidden_states_take_the_layers_with_chosen_experts():
    found = imitation_terms(
        recipe([("a", {7: [0]}), ("a", {3: [1]})], {"hidden": 1}, a=None), {"a": 4}, 8
    )
    shares = {0: 0.5, 1: 0.5}
    assert found == [
        ImitationTerm("hidden", "a", 3, 1, shares),
        ImitationTerm("hidden", "a", 7, 3, shares),
    ]


def test_hidden_states_take_all_layers_where_none_are_chosen():
    found = imitation_terms(recipe([("a", {})], {"hidden": 1}, a=None), {"a": 2}, 4)
    assert [(t.layer, t.teacher_layer) for t in found] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert all(t.shares == {0: 0.25} for t in found)


def test_experts_are_those_of_each_domain():
    """d0 and d1 share the experts of layer 3 and so a term; d2 has another teacher."""
    domains = [("a", {3: [0, 1], 5: [2]}), ("a", {3: [1, 0]}), ("b", {3: [0]})]
    found = imitation_terms(
        recipe(domains, {"experts": 1}, a={3: 0, 5: 3}, b=None), {"a": 4, "b": 8}, 8
    )
    assert found == [
        ImitationTerm("experts", "a", 3, 0, {0: 0.5, 1: 1.0}, frozenset({0, 1})),
        ImitationTerm("experts", "b", 3, 3, {2: 1.0}, frozenset({0})),
        ImitationTerm("experts", "a", 5, 3, {0: 0.5}, frozenset({2})),
    ]
    assert len({t.projection for t in found}) == 3


def test_a_committee_is_imitated_by_its_weights():
    committee = {"a": 3, "b": 1}
    found = imitation_terms(
        recipe([(committee, {3: [1], 7: [0]})], {"hidden": 1, "experts": 1}, a=None, b={7: 0}),
        {"a": 4, "b": 4},
        8,
    )
    for kind in ("hidden", "experts"):
        shares = {(t.teacher, t.layer): t.shares for t in found if t.kind == kind}
        assert shares == {("a", 3): {0: 0.375}, ("a", 7): {0: 0.375}, ("b", 7): {0: 0.25}}


@pytest.mark.parametrize(
    ("layers", "features", "message"),
    [
        ({8: 0}, {"hidden": 1}, "teachers.a.layers: 8 is no layer of the student"),
        ({3: 4}, {"hidden": 1}, "teachers.a.layers.3: 4 is no layer of the teacher"),
        ({2: 0, 3: 0}, {"experts": 1}, "teachers.a.layers: 2 has no experts that a domain chose"),
    ],
)
def test_layers_that_cannot_be(layers, features, message):
    with pytest.raises(RecipeError) as error:
        imitation_terms(recipe([("a", {3: [0]})], features, a=layers), {"a": 4}, 8)
    assert message in str(error.value)
