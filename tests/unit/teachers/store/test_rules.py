"""What a recipe may not ask of a store, and of what it must be about."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.store.manifest import StoredStates
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
    check_use(found, "coder", plan_of())


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
        (
            dict(more=", tail: sample", teacher="{coder: 0.5, other: 0.5}"),
            "teachers.coder.tail: 'sample' is of drawn ids, and other of domains[1].teacher draws",
        ),
        (
            dict(
                more=', tail: renormalize}\n  more: {source: "store:/t"',
                teacher="{coder: 0.5, more: 0.5}",
            ),
            "teachers.coder.tail: 'renormalize' is not that of teacher more (bucket)",
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
    with pytest.raises(
        RecipeError, match=r"teachers.other.tail: 'renormalize' is for a store or server"
    ):
        recipe_from_yaml(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(more=", temperature: 3.0"), "3.0 is not one of those that the store was written for"),
        (dict(more=", tail: sample"), "'sample' is not of this store, which has the most likely"),
        (
            dict(objective="confidence: entropy"),
            "objective.confidence: 'entropy' needs a teacher's",
        ),
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
        check_use(found, "coder", plan_of())


STATES = plan_of(
    slots=1, log_probs="native", temperatures=[1.0], labels=False,
    states=StoredStates(16, "bfloat16", []),
)  # fmt: skip
DRAWN_PLAN = plan_of(log_probs="drawn", temperatures=[2.0])
UNLABELLED = plan_of(labels=False)


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (STATES, dict(objective="confidence: entropy, divergence: jsd"), None),
        (STATES, dict(more=", temperature: 7.0", objective="skip_worse: true"), None),
        (STATES, dict(more=", tail: renormalize"), "this store has states: all are known; remove"),
        (
            dataclasses.replace(STATES, states=StoredStates(16, "bfloat16", [7])),
            dict(objective="divergence: reverse_kl"),
            "objective.divergence: 'reverse_kl' is infinite where a teacher gives no probability",
        ),
        (DRAWN_PLAN, dict(more=", tail: sample, temperature: 2.0"), None),
        (
            DRAWN_PLAN,
            dict(more=", temperature: 2.0"),
            "which has ids that were drawn; write tail: s",
        ),
        (DRAWN_PLAN, dict(more=", tail: sample"), "1.0 is not one of those that the store was wri"),
        (UNLABELLED, {}, None),
        (UNLABELLED, dict(objective="confidence: label"), "and teachers.coder does not keep that"),
        (
            UNLABELLED,
            dict(objective="skip_worse: true"),
            "objective.skip_worse: True needs a teach",
        ),
    ],
)
def test_what_other_stores_know(plan, changes, message):
    found = recipe(**changes)
    if message is None:
        check_use(found, "coder", plan)
        return
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_use(found, "coder", plan)


def test_committees_of_drawn_and_unlabelled_stores():
    text = RECIPE.replace("MORE", ", tail: sample").replace('hf:/o"', 'store:/o", tail: sample')
    text = text.replace("OBJECTIVE", "").replace("SECTION", "")
    text = text.replace("teacher: TEACHER", "teacher: {coder: 1, other: 1}, committee: BY")
    recipe_from_yaml(text.replace("BY", "label"))
    with pytest.raises(RecipeError, match=r"domains\[1\].committee: 'top' needs a teacher's most"):
        recipe_from_yaml(text.replace("BY", "top"))
    found = recipe_from_yaml(text.replace("BY", "label").replace(", tail: sample", ""))
    with pytest.raises(RecipeError, match=r"domains\[1\].committee: 'label' needs a teacher's pro"):
        check_use(found, "coder", UNLABELLED)


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
    told = told_of("coder", found, manifest, SimpleNamespace())
    assert "a store of hf:/model (Llama): 1,000 tokens, ids of 0.9 of the probability" in told
    assert "150 bytes a token, not signed" in told
    told = told_of(
        "coder", found, manifest, SimpleNamespace(global_batch_size=1024, seq_length=1024)
    )
    assert "150 bytes a token, at most 150.0 MiB a step, not signed" in told
