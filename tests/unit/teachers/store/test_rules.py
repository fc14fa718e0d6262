"""What a recipe may not ask of a store, and of what it must be about."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.store.part import data_in_store, told_of
from megatron_moe_inject.teachers.store.rules import check_use
from tests.harness.stores import plan_of

RECIPE = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {1: [0]}}}
  - {name: prose, data: [2], teacher: TEACHER, experts: {layers: {1: [1]}}}
teachers:
  coder: {source: "store:/s"MORE}
  other: {source: "hf:/o"}
objective: {OBJECTIVE}
SECTION
"""


def recipe(more="", teacher="other", objective="alpha: 0.5", section=""):
    text = RECIPE.replace("MORE", more).replace("TEACHER", teacher)
    return recipe_from_yaml(text.replace("OBJECTIVE", objective).replace("SECTION", section))


def test_a_recipe_with_a_store():
    found = recipe(", temperature: 2.0, tail: renormalize")
    assert found.teachers["coder"].kind == "store"
    check_use(found, "coder", [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(more=", window: 2"), "teachers.coder.window: 2 is of a model, and a store runs none"),
        (dict(more=", dtype: bf16"), "teachers.coder.dtype: 'bf16' is of a model"),
        (dict(more=", ranks: pipeline"), "teachers.coder.ranks: 'pipeline' is of a model"),
        (dict(more=", prefix: bos"), "teachers.coder.prefix: 'bos' is of a model"),
        (
            dict(more=", layers: {0: 1}", section="imitation: {hidden: 1.0}"),
            "teachers.coder.layers: {0: 1} is of a model",
        ),
        (dict(section="imitation: {hidden: 1.0}"), "imitation.hidden: 1.0 compares layers, and te"),
        (dict(objective="confidence: label"), "objective.confidence: 'label' needs a teacher's wh"),
        (dict(objective="skip_worse: true"), "objective.skip_worse: True needs a teacher's whole"),
        (
            dict(teacher="{coder: 0.5, other: 0.5}"),
            "domains[1].teacher: 'coder, other' mixes whole distributions, and coder is a store",
        ),
        (
            dict(more=", tail: renormalize", objective="divergence: jsd"),
            "teachers.coder.tail: 'renormalize' knows nothing of the ids that are not stored",
        ),
        (dict(more=", tail: top"), "teachers.coder.tail: 'top' is not known"),
    ],
)
def test_what_a_store_cannot_do_is_refused(changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(**changes)


def test_what_only_a_store_has_is_refused_of_models():
    text = RECIPE.replace('"hf:/o"', '"hf:/o", tail: renormalize').replace("MORE", "")
    text = text.replace("TEACHER", "other").replace("OBJECTIVE", "").replace("SECTION", "")
    with pytest.raises(RecipeError, match=r"teachers.other.tail: 'renormalize' is for a store; wr"):
        recipe_from_yaml(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(more=", temperature: 3.0"), "3.0 is not one of those that the store was written for"),
        (dict(more=", tail: sample"), "'sample' is of ids that were drawn"),
        (
            dict(teacher="coder, temperature: 2.0"),
            "teachers.coder.temperature: [1.0, 2.0] are several, and a store is read at one; give",
        ),
    ],
)
def test_what_this_store_does_not_know(changes, message):
    if changes.get("teacher"):
        text = RECIPE.replace("teacher: TEACHER", "teacher: " + changes["teacher"])
        text = text.replace('  other: {source: "hf:/o"}\n', "")
        found = recipe_from_yaml(
            text.replace("MORE", "").replace("OBJECTIVE", "alpha: 0.5").replace("SECTION", "")
        )
    else:
        found = recipe(**changes)
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_use(found, "coder", [1.0, 2.0])


def test_data_is_known_by_its_index_and_size_not_by_its_name(tmp_path):
    import hashlib

    paths = [str(tmp_path / name) for name in ("general", "code", "prose")]
    for path in paths:
        for end in (".idx", ".bin"):
            (tmp_path / f"{path}{end}").write_text(path)
    size, digest = len(paths[1]), hashlib.sha256(paths[1].encode()).hexdigest()
    plan = plan_of()
    own = dataclasses.replace(
        plan.data[1], name="named", idx_sha256=digest, bin_bytes=size, bin_sample_sha256=digest
    )
    plan = dataclasses.replace(plan, data=[plan.data[0], own])
    facts = SimpleNamespace(
        mock_data=False, data_paths={"train": tuple(paths), "valid": tuple(paths)}
    )
    manifests = {"coder": SimpleNamespace(plan=plan)}
    assert data_in_store(recipe(), facts, manifests) == {"coder": {paths[1]: 1}}
    (tmp_path / "code.bin").write_text(paths[2].ljust(size))
    with pytest.raises(
        RecipeError,
        match=r"says nothing about .*/code, the text of its domain; it is about text0, named",
    ):
        data_in_store(recipe(), facts, manifests)
    renamed = dataclasses.replace(own, name="code")
    manifests = {"coder": SimpleNamespace(plan=dataclasses.replace(plan, data=[renamed]))}
    with pytest.raises(RecipeError, match="it is about another version of code"):
        data_in_store(recipe(), facts, manifests)


def test_what_the_plan_says_of_it(tmp_path):
    found = recipe()
    found.teachers["coder"].source = f"store:{tmp_path}"
    manifest = SimpleNamespace(plan=plan_of(mass=0.9), rows=1000, bytes=150_000)
    told = told_of("coder", found, manifest)
    assert "a store of hf:/model (Llama): 1,000 tokens, ids of 0.9 of the probability" in told
    assert "150 bytes a token, not signed" in told
