"""Recipes of unit tests: one that is right, changes to it, students beside it."""

import copy
import dataclasses
import json

import pytest
import yaml

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import (
    StudentFacts,
)
from megatron_moe_inject.recipe.load import (
    recipe_from_flags,
    recipe_from_yaml,
)

GOOD = {
    "domains": [
        {"name": "code", "data": [1], "teacher": "coder", "experts": {"layers": {3: [0, 5]}}},
        {"name": "math", "data": ["/d/math"], "experts": {"layers": {3: [5], 7: [1]}}},
    ],
    "teachers": {"coder": {"source": "megatron:/ckpt/coder"}},
    "objective": {"alpha": 0.7, "beta": 0.3},
}


def text_with(changes):
    """GOOD as YAML with dotted paths replaced; a value of ``...`` deletes the key."""
    tree = copy.deepcopy(GOOD)
    for path, value in changes.items():
        node, parts = tree, [int(p) if p.isdigit() else p for p in path.split(".")]
        for part in parts[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        if value is ...:
            del node[parts[-1]]
        else:
            node[parts[-1]] = value
    return yaml.safe_dump(tree, sort_keys=False)


def message_of(call):
    """The one line of the ``RecipeError`` that ``call`` raises."""
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def facts(train=("/d/en", "/d/code"), **changes):
    paths = {split: tuple(train) for split in ("train", "valid", "test")}
    paths |= changes.pop("data_paths", {})
    base = StudentFacts(
        num_layers=8,
        num_moe_experts=16,
        router_topk=2,
        moe_layers=tuple(range(1, 8)),
        data_paths={split: entries for split, entries in paths.items() if entries is not None},
    )
    return dataclasses.replace(base, **changes)


def recipe(*data, experts="3:0,5", **more):
    return recipe_from_flags(data=list(data or (1,)), experts=experts, teacher="hf:/t", **more)


def two_domains(first, second, general=()):
    return recipe_from_yaml(
        json.dumps(
            {
                "domains": [
                    {"name": "a", "data": first, "experts": {"layers": {"3": [0]}}},
                    {"name": "b", "data": second, "experts": {"layers": {"3": [1]}}},
                ],
                "general_data": list(general),
                "objective": {"alpha": 0, "beta": 1},
            }
        )
    )
