"""Experts by profile: what a recipe asks for, resolved against the profile and the student."""

import dataclasses
import json
import shlex
from argparse import ArgumentParser

import numpy as np
import pytest

from megatron_moe_inject.cli import (
    main,
    recipe_for_student,
)
from megatron_moe_inject.experts.choose.choice import choose_experts, resolve_experts
from megatron_moe_inject.experts.choose.profile_file import profile_checksum, write_profile
from megatron_moe_inject.experts.choose.select import contrast, select_experts
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.expert_choice import ExpertChoice, describe_choice
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.flags import add_inject_arguments
from megatron_moe_inject.recipe.load import dump_recipe, load_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.rules import validate
from tests.harness.profiles import from_counts, profile

TOKEN = {"method": "token", "threshold": 0.5}
FACTS = StudentFacts(
    num_layers=4,
    num_moe_experts=8,
    router_topk=2,
    moe_layers=(1, 2, 3),
    data_paths={"train": ("/d/en", "/d/code")},
)


def recipe_text(**choice):
    return json.dumps(
        {
            "domains": [{"name": "code", "data": [1], "experts": choice}],
            "objective": {"alpha": 0, "beta": 1},
        }
    )


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A profile in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_profile("p.json", profile())
    return "p.json"


def message_of(call):
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def chosen(found, **choice):
    """Ids by row of a profile made by ``from_counts``, in the order they were taken."""
    return choose_experts(ExpertChoice(profile="p.json", **choice), found, "code")


# methods

COUNTS = [[10, 50, 30, 10], [40, 20, 20, 20]]
GATES = [[50.0, 20.0, 20.0, 10.0], [10.0, 10.0, 10.0, 70.0]]
GENERAL = [[10, 80, 5, 5], [40, 10, 25, 25]]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"method": "token", "threshold": 0.6}, {0: [1, 2], 1: [0, 1]}),
        ({"method": "gate", "threshold": 0.6}, {0: [0, 1], 1: [3]}),
        ({"method": "contrast", "threshold": 0.8}, {0: [2], 1: [1]}),
        ({"method": "token", "threshold": 0.6, "at_most": 1}, {0: [1], 1: [0]}),
        ({"method": "token", "threshold": 0.1, "at_least": 2}, {0: [1, 2], 1: [0, 1]}),
        ({"method": "token", "threshold": 0.6, "only_layers": [1]}, {1: [0, 1]}),
        ({"method": "token", "threshold": 0.6, "ep": 2}, {0: [1, 2], 1: [0, 2]}),
        ({"method": "top_n", "n": 1}, {0: [1], 1: [0]}),
        ({"method": "top_n", "n": 1, "score": "gate"}, {0: [0], 1: [3]}),
        ({"method": "top_n", "n": 1, "score": "contrast"}, {0: [2], 1: [1]}),
        ({"method": "budget", "budget": 0.25}, {0: [1], 1: [0]}),
        ({"method": "budget", "budget": 0.375}, {0: [1, 2], 1: [0]}),
        ({"method": "budget", "budget": 0.25, "score": "gate"}, {0: [0], 1: [3]}),
        ({"method": "budget", "budget": 0.125}, {0: [1]}),
        ({"method": "budget", "budget": 0.375, "at_least": 1, "at_most": 2}, {0: [1, 2], 1: [0]}),
        # 8 experts of 1,000 in a model of 80,000
        ({"method": "budget", "budget": 0.025, "budget_of": "all"}, {0: [1], 1: [0]}),
        ({"method": "budget", "budget": 1.0, "budget_of": "all", "score": "gate"},
         {0: [0, 1, 2, 3], 1: [3, 0, 1, 2]}),
    ],
)  # fmt: skip
def test_methods(choice, expected):
    assert chosen(from_counts(COUNTS, GATES, general=GENERAL), **choice) == expected


def test_methods_on_random_counts():
    found = profile()
    code, general = found.classes["code"], found.classes["general"]
    for method, scores in (
        ("token", code.selections),
        ("gate", code.gate_sums),
        ("contrast", np.maximum(contrast(code.selections, general.selections), 0)),
    ):
        ids = select_experts(scores, threshold=0.6)
        assert chosen(found, method=method, threshold=0.6) == dict(zip((1, 2, 3), ids, strict=True))


@pytest.mark.parametrize(
    ("choice", "part"),
    [
        ({**TOKEN, "only_layers": [2]}, "only_layers: 2 is no MoE layer of the profile; MoE lay"),
        ({**TOKEN, "ep": 3}, "ep: 3 does not divide 4 experts"),
        ({**TOKEN, "at_least": 5}, "layer 0: 5 experts are asked for, but only 4 have a score"),
        ({"method": "budget", "budget": 0.1}, "budget: 0 experts are too few"),
        ({"method": "contrast", "threshold": 0.2}, "no class 'general' to contrast with; merge"),
        ({"method": "top_n", "n": 1, "score": "contrast"}, "no class 'general' to contrast with"),
    ],
)
def test_choices_that_a_profile_cannot_give(choice, part):
    assert part in message_of(lambda: chosen(from_counts(COUNTS), **choice))


def test_general_data_without_tokens_is_no_contrast():
    found = from_counts(COUNTS, general=[[1, 1, 1, 1], [0, 0, 0, 0]])
    assert "layer 1: the class 'general' has no tokens to contrast with" in message_of(
        lambda: chosen(found, method="contrast", threshold=0.2)
    )


def test_classes_that_are_no_domain():
    found = profile()
    asked = ExpertChoice(profile="p.json", **TOKEN)
    message = message_of(lambda: choose_experts(asked, found, "cod"))
    assert message == "domain: the profile has no class 'cod'; did you mean code? it has: code, " \
                      "general"  # fmt: skip
    assert "domain: 'general' is no domain" in message_of(
        lambda: choose_experts(asked, found, "general")
    )


def test_a_class_without_tokens_is_named_by_layer():
    found = from_counts([[0, 0], [1, 1]])
    assert "layer 0: no expert has a score" in message_of(lambda: chosen(found, **TOKEN))
    assert chosen(found, **TOKEN, only_layers=[1]) == {1: [0]}


# recipes


def test_resolved_recipe_is_plain_and_says_where_from(file):
    recipe = recipe_from_yaml(recipe_text(profile=file, **TOKEN))
    resolved = resolve_experts(recipe, FACTS)
    layers = {la: sorted(ids) for la, ids in chosen(profile(), **TOKEN).items()}
    checksum = profile_checksum(profile())[:12]
    origin = f"token share until 0.5, class code of p.json (sha256 {checksum})"
    assert resolved.domains[0].experts == ExpertChoice(layers, origin=origin)
    assert recipe.domains[0].experts.profile == file  # the argument is left alone
    validate(resolved)
    assert recipe_from_yaml(dump_recipe(resolved)) == resolved
    assert resolve_experts(resolved, FACTS) == resolved
    assert resolved.experts_by_layer() == layers
    lines = render_plan(Plan(resolved, FACTS)).splitlines()
    assert f"  code: {origin}" in lines
    for layer, ids in layers.items():
        assert any(line.startswith(f"  code        {layer}  {ids[0]}") for line in lines)


def test_a_recipe_without_profiles_stays_as_it_is():
    recipe = recipe_from_yaml(recipe_text(layers={3: [0]}))
    assert resolve_experts(recipe, FACTS) == recipe


def test_another_class_of_the_profile(file):
    recipe = recipe_from_yaml(recipe_text(profile=file, **TOKEN, domain="math"))
    assert message_of(lambda: resolve_experts(recipe)).startswith(
        "domains[0].experts.domain: the profile has no class 'math'"
    )
    write_profile(file, profile(names=("math", "general")))
    assert resolve_experts(recipe).domains[0].experts.layers == {
        la: sorted(ids)
        for la, ids in choose_experts(
            ExpertChoice(profile=file, **TOKEN), profile(names=("math",)), "math"
        ).items()
    }


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_layers": 5}, "is of a student with layers 4, and this one has 5"),
        ({"num_moe_experts": 16}, "with experts in a layer 8, and this one has 16"),
        ({"num_moe_experts": None, "moe_layers": ()}, "experts in a layer 8, and this one has 0"),
        ({"moe_layers": (0, 2, 3)}, "with MoE layers 1-3, and this one has 0, 2-3"),
        ({"router_topk": 4}, "with experts per token 2, and this one has 4"),
    ],
)
def test_profiles_of_other_students(file, change, part):
    recipe = recipe_from_yaml(recipe_text(profile=file, **TOKEN))
    message = message_of(lambda: resolve_experts(recipe, dataclasses.replace(FACTS, **change)))
    assert message.startswith("domains[0].experts.profile: 'p.json' is of a student")
    assert part in message
    assert message.endswith("use a profile of this student")


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ({"profile": "none.json", **TOKEN}, [".profile: none.json: cannot be read", "relative to"]),
        ({"profile": "bad.json", **TOKEN}, [".profile: bad.json: is damaged"]),
        ({"profile": "p.json", **TOKEN, "at_least": 9}, ["domains[0].experts: layer 1: 9 experts"]),
        ({"profile": "p.json", **TOKEN, "only_layers": [0]}, ["experts.only_layers: 0 is no MoE"]),
    ],
)
def test_every_mistake_names_the_recipe(file, tmp_path, choice, parts):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "r.yaml").write_text(recipe_text(**choice))
    flags = ["--num-layers", "4", "--num-experts", "8", "--moe-layer-freq", "[0]+[1]*3"]
    flags += ["--data-path", "1", "en", "1", "code"]
    recipe = load_recipe("r.yaml")
    for part in parts:
        assert part in message_of(lambda: resolve_experts(recipe))
    missing = choice["profile"] == "none.json"  # which a plan only says
    assert main(["plan", "r.yaml"]) == (0 if missing else 2)
    write_data(tmp_path, "en", "code")
    assert main(["plan", "r.yaml", "--", *flags]) == (0 if missing else 2)


def write_data(folder, *prefixes):
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            (folder / f"{prefix}{suffix}").touch()


def test_a_plan_before_its_profile(file, tmp_path, capsys):
    """It says what will be chosen, and everything else is checked."""
    options = {"profile": "later.json", **TOKEN, "at_most": 3}
    (tmp_path / "r.yaml").write_text(recipe_text(**options))
    write_data(tmp_path, "en", "code")
    flags = ["--num-layers", "4", "--num-experts", "8", "--moe-layer-freq", "[0]+[1]*3"]
    flags += ["--data-path", "1", "en", "1", "code"]
    steered = ["--inject-set", "steering.coeff=0.01"]
    for arguments in (["plan", "r.yaml", *steered], ["plan", "r.yaml", *steered, "--", *flags]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert (
            "  code: still to be chosen by token share until 0.5, at most 3, class code of "
            "later.json (not there yet)" in out
        )
        assert "  experts still to be chosen; everything else is frozen" in out
        assert "on a domain's experts, all their layers" in out
        assert f"  later.json is no file yet (in {tmp_path}): training needs it" in out
    many = {"method": "top_n", "n": 9, "threshold": None, "at_most": None}
    for choice, more, part in (
        ({"only_layers": [0]}, [], "domains[0].experts.only_layers: 0 is no MoE layer of"),
        (many, [], "domains[0].experts.n: 9 is more than a layer has"),
        ({}, ["--num-experts", "0"], "domains[0].experts: 'later.json' is to choose experts of a"),
        ({}, ["--data-path", "1", "en", "1", "cod"], "--data-path: 'cod' has no cod.bin, cod.idx"),
    ):
        kept = {k: v for k, v in (options | choice).items() if v is not None}
        (tmp_path / "r.yaml").write_text(recipe_text(**kept))
        assert main(["plan", "r.yaml", "--", *flags, *more]) == 2
        assert part in capsys.readouterr().err


def test_plan_on_the_command_line(file, tmp_path, capsys):
    write_data(tmp_path, "en", "code")
    (tmp_path / "r.yaml").write_text(recipe_text(profile=file, **TOKEN))
    expected = chosen(profile(), **TOKEN)
    total = sum(map(len, expected.values()))
    flags = ["--num-layers", "4", "--num-experts", "8", "--moe-layer-freq", "[0]+[1]*3"]
    flags += ["--data-path", "1", "en", "1", "code"]
    for arguments in (["plan", "r.yaml"], ["plan", "r.yaml", "--", *flags]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert f"  {total} experts in 3 layers" in out
        assert "  code: token share until 0.5, class code of p.json (sha256 " in out
    assert main(["plan", "r.yaml", "--", *flags, "--moe-router-topk", "4"]) == 2
    assert capsys.readouterr().err.startswith(
        "moe-inject: r.yaml: domains[0].experts.profile: 'p.json' is of a student with experts "
        "per token 2, and this one has 4"
    )
    override = "domains[0].experts.threshold=0.9"
    assert main(["plan", "r.yaml", "--inject-set", override]) == 0
    assert "token share until 0.9" in capsys.readouterr().out
    override = "domains[0].experts.domain=cod"
    assert main(["plan", "r.yaml", "--inject-set", override]) == 2
    assert capsys.readouterr().err.startswith(f"moe-inject: --inject-set {override}: domains[0]")


def test_training_flags_resolve_too(file, tmp_path):
    from megatron.training.arguments import add_megatron_arguments

    (tmp_path / "r.yaml").write_text(recipe_text(profile=file, **TOKEN))
    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_inject_arguments(parser)
    line = "--num-layers 4 --num-experts 8 --moe-layer-freq [0]+[1]*3 --data-path 1 en 1 code"
    recipe, _ = recipe_for_student(parser.parse_args(shlex.split(line + " --inject-recipe r.yaml")))
    assert recipe.domains[0].experts.layers == {
        la: sorted(ids) for la, ids in chosen(profile(), **TOKEN).items()
    }


def test_descriptions_name_every_option():
    asked = ExpertChoice(
        profile="p.json", method="budget", budget=0.1, score="contrast", budget_of="all",
        at_least=0, at_most=4, ep=2, only_layers=[3, 4, 5],
    )  # fmt: skip
    assert describe_choice(asked, "code", "0123456789abcdef") == (
        "contrast with general, 0.1 of all parameters, at least 0, at most 4, ep 2, layers 3-5, "
        "class code of p.json (sha256 0123456789ab)"
    )
    asked = ExpertChoice(profile="p.json", method="top_n", n=3)
    assert describe_choice(asked, "x", "a" * 64).startswith("token share, 3 per layer, class x of")
