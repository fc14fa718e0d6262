"""Weights of a blend from shares, and checks of those that are there."""

from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_inject.data.mixing import blend_weights, mix
from megatron_moe_inject.recipe import GENERAL, RecipeError, recipe_from_yaml
from megatron_moe_inject.student import StudentFacts

BLEND = {"train": ("text", "code", "web", "law")}


def recipe(mixing):
    return recipe_from_yaml(
        "domains: [{name: code, data: [1]}, {name: law, data: [3]}]\n"
        "objective: {alpha: 0, beta: 1}\ntrain: {experts: all}\n"
        f"mixing: {mixing}\n"
    )


def mixed(mixing, *data_path, flag="data_path"):
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    args = Namespace(**dict.fromkeys((*names, "per_split_data_args_path")))
    setattr(args, flag, list(data_path))
    mix(recipe(mixing), args, StudentFacts(num_layers=4, num_moe_experts=4, data_paths=BLEND))
    return getattr(args, flag)


labels = st.lists(st.integers(-1, 2), min_size=1, max_size=8)
amounts = st.floats(0.01, 100)


@given(labels, st.data())
def test_named_classes_get_their_shares_and_the_rest_keeps_its_proportions(labels, data):
    found = sorted(set(labels))
    named = data.draw(st.lists(st.sampled_from(found), unique=True, max_size=len(found) - 1))
    shares = {label: 0.9 / len(named) for label in named}
    weights = data.draw(st.lists(amounts, min_size=len(labels), max_size=len(labels)))
    result = blend_weights(labels, weights, shares)
    assert sum(result) == pytest.approx(1)
    for label in named:
        own = sum(w for w, at in zip(result, labels, strict=True) if at == label)
        assert own == pytest.approx(shares[label])
    rest = [(w, r) for w, r, at in zip(weights, result, labels, strict=True) if at not in named]
    for weight, new in rest:
        assert new / weight == pytest.approx(rest[0][1] / rest[0][0])


def test_a_blend_without_weights_gets_them():
    assert mixed("{general: 0.1}", *BLEND["train"]) == (
        ["0.05", "text", "0.45", "code", "0.05", "web", "0.45", "law"]
    )
    built = mixed("{general: 0.1, law: 0.3}", *BLEND["train"], flag="train_data_path")
    assert [float(w) for w in built[::2]] == pytest.approx([0.05, 0.6, 0.05, 0.3])
    assert GENERAL == -1


def test_weights_that_agree_stay_as_they_are():
    given_weights = ["5", "text", "30", "code", "5", "web", "60", "law"]
    assert mixed("{general: 0.1}", *given_weights) == given_weights


@pytest.mark.parametrize(
    ("mixing", "blend", "expected"),
    [
        (
            "{general: 0.1}",
            ("4", "text", "3", "code", "0", "web", "3", "law"),
            "mixing: general has 40.0% of the training blend, but 10.0% is asked for; leave out "
            "the weights, or write 0.1 text 0.45 code 0 web 0.45 law",
        ),
        (
            "{general: 0.1}",
            ("0", "text", "5", "code", "0", "web", "5", "law"),
            "mixing: general has 0.0% of the training blend, but 10.0% is asked for; leave out "
            "the weights, or write 0.05 text 0.45 code 0.05 web 0.45 law",
        ),
        ("{general: 0.5, code: 0.6}", BLEND["train"], "is more than 1 in sum"),
        ("{general: 0.5, code: 0.2, law: 0.2}", BLEND["train"], "names all of the blend, but"),
        ("{prose: 0.5}", BLEND["train"], "mixing.prose: 0.5 is the share of no domain"),
        ("{general: 0.0}", BLEND["train"], "mixing.general: 0.0 is not in (0, 1]"),
    ],
)
def test_mistakes(mixing, blend, expected):
    with pytest.raises(RecipeError) as error:
        mixed(mixing, *blend)
    assert expected in str(error.value)


def test_a_class_without_data():
    facts = StudentFacts(num_layers=4, num_moe_experts=4, data_paths={"train": ("code",)})
    only = recipe_from_yaml(
        "domains: [{name: code, data: [0]}]\nobjective: {alpha: 0, beta: 1}\n"
        "train: {experts: all}\nmixing: {general: 0.1}\n"
    )
    with pytest.raises(RecipeError, match=r"mixing\.general: 0\.1 is the share of data that the"):
        mix(only, Namespace(data_path=["code"]), facts)
