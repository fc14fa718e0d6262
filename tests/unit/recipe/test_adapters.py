"""``train.adapters`` and ``train.vocabulary_rows`` in recipes: mistakes, plans, and numbers."""

from dataclasses import replace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.layer_numbers import renumbered
from megatron_moe_inject.recipe.load import recipe_from_yaml

BASE = """
domains: [{name: code, data: [1], experts: {layers: {1: [0]}}}]
objective: {alpha: 0, beta: 1}
train:
  experts: none
"""


def recipe(train):
    return recipe_from_yaml(BASE + "".join(f"  {line}\n" for line in train.splitlines()))


WRONG = {
    "no targets": ("adapters: [{targets: []}]", "train.adapters[0].targets: [] is empty"),
    "unknown": ("adapters: [{targets: [expert]}]", "train.adapters[0].targets[0]: 'expert'"),
    "embedding": ("adapters: [{targets: [embedding]}]", "train.vocabulary_rows"),
    "twice": ("adapters: [{targets: [mlp, mlp]}]", "targets[1]: 'mlp' is there twice"),
    "rank": ("adapters: [{targets: [mlp], rank: 0}]", "train.adapters[0].rank: 0 is no rank"),
    "alpha": ("adapters: [{targets: [mlp], alpha: 0}]", "train.adapters[0].alpha"),
    "rate": ("adapters: [{targets: [mlp], lr: -1}]", "train.adapters[0].lr"),
    "scaling": ("adapters: [{targets: [mlp], scaling: rs}]", "train.adapters[0].scaling"),
    "negative layer": ("adapters: [{targets: [mlp], layers: [-1]}]", "names a negative layer"),
    "whole attention": (
        "adapters: [{targets: [attention]}]\nattention: true",
        "names attention, while train.attention trains",
    ),
    "whole rows": (
        "adapters: [{targets: [router]}]\nrouter_rows: true",
        "set train.router_rows: false",
    ),
    "whole head": (
        "adapters: [{targets: [output_layer]}]\nvocabulary_rows: {ids: [1]}",
        "names output_layer beside train.vocabulary_rows",
    ),
    "domains of all tokens": (
        "adapters: [{targets: [mlp], domains: [code]}]",
        "train.adapters[0].domains: ['code'] stands without by: domain",
    ),
    "by what": ("adapters: [{targets: [mlp], by: token}]", "train.adapters[0].by: 'token'"),
    "factors of no domain": (
        "adapters: [{targets: [mlp], by: domain, domains: [cod]}]",
        "train.adapters[0].domains[0]: 'cod' is no domain; did you mean code?",
    ),
    "a domain twice": (
        "adapters: [{targets: [mlp], by: domain, domains: [code, code]}]",
        "train.adapters[0].domains[1]: 'code' is there twice",
    ),
    "a head by domain": (
        "adapters: [{targets: [output_layer], by: domain}]",
        "names output_layer, whose product is taken in the loss, where all tokens pass the same",
    ),
    "no way": ("vocabulary_rows: {domain: code}", "is not one way of choosing rows"),
    "two ways": ("vocabulary_rows: {ids: [1], budget: 0.1}", "ids and budget"),
    "no domain": ("vocabulary_rows: {budget: 0.1}", "train.vocabulary_rows.domain: None"),
    "another domain": ("vocabulary_rows: {domain: art, budget: 0.1}", "write one of code"),
    "domain of no use": ("vocabulary_rows: {domain: code, ids: [1]}", "is of no use beside ids"),
    "an id twice": ("vocabulary_rows: {ids: [1, 1]}", "has one twice or a negative one"),
    "all rows": ("vocabulary_rows: {domain: code, budget: 1.5}", "train.vocabulary_rows.budget"),
    "embedding too": ("vocabulary_rows: {ids: [1]}\nembedding: true", "stands beside train.embed"),
}


@pytest.mark.parametrize(("train", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named(train, message):
    with pytest.raises(RecipeError) as error:
        recipe(train)
    assert message in str(error.value)


def test_experts_that_train_whole_have_no_adapters():
    text = BASE.replace("experts: none", "experts: selected")
    with pytest.raises(RecipeError, match=r"names experts, while train\.experts trains"):
        recipe_from_yaml(text + "  adapters: [{targets: [experts]}]\n")


def test_selected_experts_are_selected():
    text = BASE.replace(", experts: {layers: {1: [0]}}", "")
    with pytest.raises(RecipeError, match="not every domain chooses experts"):
        recipe_from_yaml(text + "  adapters: [{targets: [experts]}]\n")
    recipe_from_yaml(text + "  adapters: [{targets: [experts], experts: all}]\n")


DOMAINS = """
domains:
  - {name: code, data: [1], experts: {layers: {1: [0], 3: [2]}}}
  - {name: html, data: [2], experts: {layers: {1: [4]}}}
  - {name: art, data: [3]}
objective: {alpha: 0, beta: 1}
train:
  experts: none
  adapters:
    - {targets: [attention], rank: 2}
    - {targets: [experts], rank: 4, by: domain, domains: [html, code]}
    - {targets: [mlp], by: domain}
"""


def test_each_domain_has_factors_of_its_own_on_its_own_experts():
    """In the order in which they are named; domains without are not asked for experts."""
    own = recipe_from_yaml(DOMAINS)
    sets = own.factor_sets()
    assert [(s.number, s.domain, s.label) for s in sets] == [
        *((0, None, None), (1, "html", 1), (1, "code", 0)),
        *((2, "code", 0), (2, "html", 1), (2, "art", 2)),
    ]
    assert [sets[i].selected for i in (0, 1, 2)] == [
        {1: [0, 4], 3: [2]},
        {1: [4]},
        {1: [0], 3: [2]},
    ]
    lines = FEATURES["adapters"].plan_lines(own, None)["beside the student"]
    assert lines[1].endswith("; of each domain its own (html, code), general text passes none")
    assert FEATURES["adapters"].warnings(own) == []
    with pytest.raises(RecipeError, match="not every domain chooses experts"):
        recipe_from_yaml(DOMAINS.replace(", domains: [html, code]", ""))


def test_what_general_text_cannot_teach_is_told():
    text = "adapters: [{targets: [mlp], by: domain}]"
    (told,) = FEATURES["adapters"].warnings(recipe(text))
    assert "objective.gamma and losses on general text change nothing" in told
    for more in ("norms: true", "vocabulary_rows: {ids: [1]}"):
        assert FEATURES["adapters"].warnings(recipe(f"{text}\n{more}")) == []


def test_a_dispatcher_that_sends_nothing_along():
    """Refused beside what may be on experts."""
    facts = StudentFacts(2, 4, 2, (0, 1), options={"moe_token_dispatcher_type": "flex"})

    def refused(train):
        for refusal in FEATURES["adapters"].refuses:
            refusal.check(recipe(train), facts)

    for target in ("experts", "'*.mlp.*'"):
        with pytest.raises(RecipeError, match="does not send the domain of each row along"):
            refused(f"adapters: [{{targets: [{target}], by: domain}}]")
    refused("adapters: [{targets: [attention], by: domain}]")
    refused("adapters: [{targets: [experts]}]")


UNFIT = {
    "a dense student": ("experts", StudentFacts(2), "the student is dense"),
    "no shared experts": ("shared_experts", StudentFacts(2, 4, 2, (0, 1)), "has none"),
    "no dense layer": ("mlp", StudentFacts(2, 4, 2, (0, 1)), "every layer is a MoE layer"),
    "a tied head": (
        "output_layer",
        StudentFacts(2, 4, 2, (0, 1), tied_embeddings=True),
        "it is one matrix with the embedding",
    ),
}


@pytest.mark.parametrize(("target", "facts", "message"), UNFIT.values(), ids=UNFIT)
def test_what_the_student_lacks(target, facts, message):
    with pytest.raises(RecipeError, match=message):
        FEATURES["adapters"].check(recipe(f"adapters: [{{targets: [{target}]}}]"), facts)


def test_a_layer_that_the_student_lacks():
    own = recipe("adapters: [{targets: [attention], layers: [1, 2]}]")
    with pytest.raises(RecipeError, match="the student's layers are 0 to 1"):
        FEATURES["adapters"].check(own, StudentFacts(2, 4, 2, (0, 1)))


def test_the_scale():
    own = recipe(
        "adapters: [{targets: [mlp], rank: 16, alpha: 32}, "
        "{targets: [attention], rank: 16, alpha: 32, scaling: rslora}]"
    )
    assert [entry.scale for entry in own.train.adapters] == [2.0, 8.0]
    (usual,) = recipe("adapters: [{targets: [mlp], rank: 16}]").train.adapters
    assert (usual.scale, usual.lr) == (2.0, 4.5)


def test_plans_say_what_stands_beside():
    own = recipe(
        "adapters: [{targets: [experts, attention], rank: 4, alpha: 8, layers: [0, 1], lr: 2, "
        "lr_b: 3}]\nvocabulary_rows: {domain: code, budget: 0.3, lr: 2}"
    )
    assert FEATURES["adapters"].plan_lines(own, None) == {
        "beside the student": [
            "rank 4, scaled by 2, on selected experts, attention of layers 0-1, at 2 times the "
            "learning rate (B 3 times that)",
            "0.3 of the vocabulary's rows, by the contrast of code, at 2 times the learning rate",
        ]
    }
    (trains,) = FEATURES["train"].plan_lines(own, None)["trains"]
    assert trains == "adapters, rows of the vocabulary; everything else is frozen"


def test_blocks_of_a_gpt_model():
    own = recipe("adapters: [{targets: [attention, '*.1.mlp.*'], layers: [1]}]")
    own = renumbered(replace(own, layer_numbers="gpt"), LayerPattern("*E*E"))
    (entry,) = own.train.adapters
    assert entry.layers == [2, 3]
    assert entry.targets[0] == "attention"
    assert entry.targets[1].endswith("*.1.mlp.*")
    assert entry.targets[1] != "*.1.mlp.*"
