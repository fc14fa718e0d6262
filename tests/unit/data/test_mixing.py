"""Weights of a blend from shares, and checks of those that are there."""

from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_inject.data.mixing import blend_weights, mix
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.student import check_recipe

BLEND = {"train": ("text", "code", "web", "law")}


def recipe(mixing):
    return recipe_from_yaml(
        "domains: [{name: code, data: [1]}, {name: law, data: [3]}]\n"
        "objective: {alpha: 0, beta: 1}\ntrain: {experts: all}\n"
        f"mixing: {mixing}\n"
    )


def facts(**options):
    return StudentFacts(num_layers=4, num_moe_experts=4, data_paths=BLEND, options=options)


def arguments(flag, data_path):
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    args = Namespace(**dict.fromkeys((*names, "per_split_data_args_path")))
    setattr(args, flag, list(data_path))
    return args


def mixed(mixing, *data_path, flag="data_path"):
    args = arguments(flag, data_path)
    assert mix(recipe(mixing), args, facts()) is None
    return getattr(args, flag)


def scheduled(mixing, *data_path, sizes=(8,) * 4):
    """Weights and order of a run of some batch sizes."""
    args = arguments("data_path", data_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "batch_sizes", lambda _: list(sizes))
        return args, mix(recipe(mixing), args, facts())


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
        ("{general: 0.5, code: 0.5}", BLEND["train"], "leaves law no sample in this run"),
    ],
)
def test_mistakes(mixing, blend, expected):
    with pytest.raises(RecipeError) as error:
        mixed(mixing, *blend)
    assert expected in str(error.value)


FALLING = "{general: {points: {0: 0.6, 3: 0.0}}, law: 0.25}"


def test_a_schedule_gives_the_means_as_weights_and_an_order():
    args, order = scheduled(FALLING, *BLEND["train"])
    assert args.data_path[1::2] == list(BLEND["train"])
    assert [float(w) for w in args.data_path[::2]] == pytest.approx([0.15, 0.45, 0.15, 0.25])
    law, general = order.counts[:, 3], order.counts[:, 0] + order.counts[:, 2]
    assert law.tolist() == [2, 2, 2, 2]
    assert np.cumsum(general) == pytest.approx(np.cumsum([4.8, 3.2, 1.6, 0]), abs=0.99)
    assert order.counts.sum(axis=1).tolist() == [8] * 4


def test_larger_batches_weigh_more_in_the_means():
    args, order = scheduled(FALLING, *BLEND["train"], sizes=(4, 4, 4, 12))
    assert float(args.data_path[0]) * 2 == pytest.approx((0.6 + 0.4 + 0.2) * 4 / 24)
    assert order.counts.sum(axis=1).tolist() == [4, 4, 4, 12]


def test_classes_without_a_share_divide_what_is_left_in_each_iteration():
    _, order = scheduled("{general: {points: {0: 0.5, 1: 0.0}}}", *BLEND["train"], sizes=(64,) * 2)
    assert order.counts.tolist() == [[16, 16, 16, 16], [0, 32, 0, 32]]
    _, order = scheduled(
        "{law: {points: {0: 0.0, 1: 0.5}}}",
        *("2", "text", "4", "code", "2", "web", "2.66667", "law"),
        sizes=(64,) * 2,
    )
    assert order.counts.tolist() == [[16, 32, 16, 0], [8, 16, 8, 32]]


def test_weights_that_agree_with_the_means_divide_a_class():
    given_weights = ["1", "text", "4.5", "code", "2", "web", "2.5", "law"]
    args, order = scheduled(FALLING, *given_weights, sizes=(80,) * 4)
    assert args.data_path == given_weights
    assert order.samples.tolist() == [32, 144, 64, 80]


def test_a_constant_schedule_is_its_share():
    args, order = scheduled("{general: {points: {7: 0.1}}}", *BLEND["train"], sizes=(40,) * 3)
    assert args.data_path[::2] == mixed("{general: 0.1}", *BLEND["train"])[::2]
    assert order.counts.tolist() == [[2, 18, 2, 18]] * 3


WHOLE = "{general: {points: {0: 0.5, 2: 0.1}}, code: 0.3, law: {points: {0: 0.2, 2: %s}}}"
CROSSING = "{code: {points: {0: 0, 9: 1}, shape: cosine}, law: {points: {0: 1, 9: 0}}}"


@pytest.mark.parametrize(
    ("mixing", "sizes", "expected"),
    [
        (WHOLE % "0.5", (8,) * 4, "names all of the blend, but does not sum to 1 at iteration 1"),
        (WHOLE % "0.65", (8,) * 4, "is more than 1 in sum at iteration 2"),
        (CROSSING, (8,) * 10, "is 1.031 in sum at iteration 5; lower the shares"),
        ("{law: {points: {9: 0, 10: 1}}}", (8,) * 5, "leaves law no sample in this run"),
        ("{general: 1.0, law: {points: {0: 0}}}", (8,), "law: Schedule(points={0: 0.0}, shape="),
        ("{law: {points: {0: 0}}}", (8,), "is 0 at every iteration; remove"),
        ("{law: {points: {0: 0.1, 5: 1.1}}}", (8,), "mixing.law: 1.1 is not in [0, 1]"),
        ("{law: {points: {0: 0.1, 5: -0.1}}}", (8,), "mixing.law: -0.1 is negative"),
        ("{law: {points: {}}}", (8,), "mixing.law.points: {} is empty"),
        ("{law: {points: {-1: 0.1}}}", (8,), "mixing.law.points: -1 is negative"),
        ("{law: {points: {0: 0.1}, shape: step}}", (8,), "mixing.law.shape: 'step' is not known"),
        ("{law: x}", (8,), "mixing.law: 'x' is not a number or a schedule"),
        (FALLING, (), "changes over the iterations of a run, and this one has none; add --train-"),
    ],
)
def test_mistakes_in_schedules(mixing, sizes, expected):
    with pytest.raises(RecipeError) as error:
        scheduled(mixing, *BLEND["train"], sizes=sizes)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("share", "sizes", "expected"),
    [
        (0.5, (1,) * 40, "batches of 1 can have, which hold 0 pairs each"),
        (0.05, (1,) * 4, "hold 0 pairs each (two answers to a pair): 0 of 0 samples in this run"),
        (0.9, (3,) * 40, "batches of 3 can have, which hold 1 pairs each"),
        (0.5, (3,) * 40, None),
        (0.5, (1, 1, *(8,) * 20), None),
        (0.01, (8,) * 4, None),
    ],
)
def test_odd_batches_hold_the_pairs_that_are_asked_for(share, sizes, expected):
    text = (
        "domains: [{name: code, data: [1]}]\ntrain: {experts: all}\n"
        "objective: {alpha: 0, beta: 1, preference: {data: [2]}}\n"
        f"mixing: {{preference: {share}}}\n"
    )
    args = arguments("train_data_path", BLEND["train"][:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "batch_sizes", lambda _: list(sizes))
        own = StudentFacts(
            num_layers=4, num_moe_experts=4, data_paths={"train": BLEND["train"][:3]}, options={}
        )
        if expected is None:
            order = mix(recipe_from_yaml(text), args, own)
            assert abs(order.samples[2] - share * sum(sizes)) <= 1
            return
        with pytest.raises(RecipeError) as error:
            mix(recipe_from_yaml(text), args, own)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"mixing.preference: {share}")


def test_weights_of_other_means_are_an_error():
    with pytest.raises(RecipeError) as error:
        scheduled(FALLING, "4", "text", "3", "code", "0", "web", "3", "law")
    assert "general has 40.0% of the training blend, but 30.0% is asked for" in str(error.value)


def test_shares_that_sum_to_one_in_each_iteration_may_name_all():
    _, order = scheduled(WHOLE % "0.6", *BLEND["train"], sizes=(20,) * 3)
    assert order.counts.tolist() == [[5, 6, 5, 4], [3, 6, 3, 8], [1, 6, 1, 12]]


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"dataloader_type": "cyclic"}, "--dataloader-type cyclic: does not take samples in the"),
        ({"dataloader_type": "external"}, "--dataloader-type external: leaves Megatron's blend"),
        ({"phase_transition_iterations": [5]}, "--phase-transition-iterations: counts samples"),
        ({"decrease_batch_size_if_needed": True}, "--decrease-batch-size-if-needed: lets"),
    ],
)
def test_options_under_which_positions_are_not_iterations(option, flag):
    check_recipe(recipe("{general: 0.1}"), facts(**option))
    with pytest.raises(RecipeError) as error:
        check_recipe(recipe(FALLING), facts(**option))
    assert flag in str(error.value)
    assert "or set the shares of mixing to numbers" in str(error.value)
    check_recipe(recipe(FALLING), facts(dataloader_type="single"))


def test_the_recipe_round_trips_and_the_plan_shows_its_shares():
    found = recipe(FALLING)
    assert recipe_from_yaml(dump_recipe(found)) == found
    shown = " ".join(render_plan(Plan(found)).split())
    assert "mixing law = 0.25 (general) = linear(0: 0.6, 3: 0)" in shown
    assert "mixing" not in render_plan(Plan(recipe("{}")))


def test_a_class_without_data():
    one = StudentFacts(num_layers=4, num_moe_experts=4, data_paths={"train": ("code",)})
    only = recipe_from_yaml(
        "domains: [{name: code, data: [0]}]\nobjective: {alpha: 0, beta: 1}\n"
        "train: {experts: all}\nmixing: {general: 0.1}\n"
    )
    with pytest.raises(RecipeError, match=r"mixing\.general: 0\.1 is the share of data that the"):
        mix(only, Namespace(data_path=["code"]), one)
