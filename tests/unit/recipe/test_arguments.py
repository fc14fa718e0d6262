"""The flags: off by default, a recipe file, or the plain flags of one domain."""

import pickle
import shlex
from argparse import ArgumentParser

import pytest

from megatron_moe_inject.cli import (
    recipe_for_student,
)
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.expert_choice import ExpertChoice
from megatron_moe_inject.recipe.flags import add_inject_arguments, name_error, recipe_from_args
from megatron_moe_inject.recipe.schema import Domain, Objective, Recipe, TeacherSpec, Train

RECIPE = """
domains: [{name: code, data: [1], teacher: coder, experts: {layers: {3: [0, 5]}}}]
teachers: {coder: {source: "hf:/coder"}}
"""
PLAIN = "--inject-teacher hf:/t --inject-domain-data 1 --inject-experts 3:0,5"


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def parse(line):
    return add_inject_arguments(ArgumentParser(allow_abbrev=False)).parse_args(shlex.split(line))


def message_of(line, **kwargs):
    with pytest.raises(RecipeError) as caught:
        recipe_from_args(parse(line), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_off_means_off():
    args = parse("")
    assert set(vars(args).values()) == {None}
    assert all(name.startswith("inject_") for name in vars(args))
    assert recipe_from_args(args) is None
    assert recipe_for_student(args) is None


def test_recipe_file_with_overrides(recipe_file):
    line = f"--inject-recipe {recipe_file} --inject-set objective.alpha=2 train.router=true"
    recipe = recipe_from_args(parse(line + " --inject-set objective.alpha=3"))
    assert recipe.objective.alpha == 3.0
    assert recipe.train.router
    assert not recipe.verify_frozen
    assert recipe_from_args(parse(f"{line} --inject-verify-frozen")).verify_frozen


def test_plain_flags():
    line = (
        "--inject-teacher megatron:/t --inject-domain-name code --inject-domain-data 1 /d/code "
        '--inject-experts "12:3,40;13:1" --inject-alpha 0.7 --inject-beta 1e-1 '
        "--inject-general-beta 0.5 --inject-gamma 3 --inject-temperature 2 "
        "--inject-divergence forward_kl "
        "--inject-train-router --inject-verify-frozen"
    )
    assert recipe_from_args(parse(line)) == Recipe(
        domains=[Domain("code", [1, "/d/code"], "teacher", ExpertChoice({12: [3, 40], 13: [1]}))],
        teachers={"teacher": TeacherSpec("megatron:/t")},
        objective=Objective("forward_kl", 2.0, 0.7, 0.1, 0.5, 3.0),
        train=Train(experts="selected", router=True),
        verify_frozen=True,
    )


def test_plain_flags_take_the_recipe_defaults():
    recipe = recipe_from_args(parse(PLAIN))
    assert recipe.objective == Objective()
    assert recipe.train == Train()
    assert recipe.domains[0].name == "domain"


def test_plain_flags_with_overrides():
    recipe = recipe_from_args(parse(PLAIN + " --inject-set train.attention=true"))
    assert recipe.train.components() == ["attention"]


def test_router_alone_can_train():
    line = "--inject-teacher hf:/t --inject-domain-data 0 --inject-train-router"
    assert recipe_from_args(parse(line)).train == Train(experts="none", router=True)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--inject-dry-run", ["--inject-dry-run: there is no recipe", "--inject-recipe PATH"]),
        ("--inject-verify-frozen", ["--inject-verify-frozen: there is no recipe"]),
        ("--inject-set a=1", ["--inject-set: there is no recipe"]),
        ("--inject-teacher hf:/t", ["--inject-domain-data: missing", "position"]),
        ("--inject-alpha 1", ["--inject-domain-data: missing"]),
        (
            "--inject-teacher hf:/t --inject-domain-data 1",
            ["--inject-experts: missing", "12:3,40"],
        ),
        (f"{PLAIN} --inject-teacher /t", ["--inject-teacher: '/t' is no source", "hf:/dir"]),
        (f"{PLAIN} --inject-experts 3", ["--inject-experts: '3'", "12:3,40"]),
        (f"{PLAIN} --inject-experts 3:1,1", ["--inject-experts (layer 3): [1, 1] lists expert 1"]),
        (f"{PLAIN} --inject-alpha x", ["--inject-alpha: 'x' is not a number"]),
        (f"{PLAIN} --inject-alpha -1", ["--inject-alpha: -1.0 is negative"]),
        (f"{PLAIN} --inject-alpha [", ["--inject-alpha: '['", "write a number"]),
        (f"{PLAIN} --inject-beta .nan", ["--inject-beta: nan is not finite"]),
        (f"{PLAIN} --inject-general-beta -2", ["--inject-general-beta: -2.0 is negative"]),
        (f"{PLAIN} --inject-temperature 0", ["--inject-temperature: 0.0 is not positive"]),
        (f"{PLAIN} --inject-divergence kl", ["--inject-divergence: 'kl'", "choices: forward_kl"]),
        (f"{PLAIN} --inject-domain-name 'a b'", ["--inject-domain-name: 'a b' is no name"]),
        (f"{PLAIN} --inject-domain-data -1", ["--inject-domain-data[0]: -1 is negative"]),
        (f"{PLAIN} --inject-domain-data 1 1", ["--inject-domain-data[1]: 1 is already claimed"]),
        (f"{PLAIN} --inject-alpha 0", ["--inject-alpha: 0 and --inject-beta: 0"]),
        (
            "--inject-domain-data 1 --inject-experts 3:0",
            ["--inject-alpha: 1.0", "add --inject-teacher"],
        ),
        (f"{PLAIN} --inject-set train.x=1", ["--inject-set train.x=1: train.x: unknown key"]),
        (f"{PLAIN} --inject-set nothing", ["--inject-set 'nothing'", "KEY=VALUE"]),
        ("--inject-recipe /no/such.yaml", ["'/no/such.yaml' cannot be read"]),
    ],
)
def test_wrong_flags(line, parts):
    message = message_of(line)
    for part in parts:
        assert part in message


PLAIN_ALONE = [
    "--inject-teacher hf:/t",
    "--inject-domain-data 1",
    "--inject-domain-name x",
    "--inject-experts 1:1",
    "--inject-alpha 1",
    "--inject-beta 1",
    "--inject-general-beta 1",
    "--inject-gamma 1",
    "--inject-temperature 1",
    "--inject-divergence jsd",
    "--inject-train-router",
    "--inject-train-everything",
]


@pytest.mark.parametrize("flag", PLAIN_ALONE)
def test_plain_flags_do_not_mix_with_a_recipe(recipe_file, flag):
    message = message_of(f"--inject-recipe {recipe_file} {flag}")
    assert message.startswith(f"{flag.split()[0]}: cannot be combined with --inject-recipe")
    assert "--inject-set" in message


def test_every_plain_flag_is_covered():
    parser = add_inject_arguments(ArgumentParser())
    flags = {s for s in parser._option_string_actions if s.startswith("--inject-")}
    shared = {"--inject-recipe", "--inject-set", "--inject-dry-run", "--inject-verify-frozen"}
    shared |= {"--inject-profile", "--inject-profile-coselections", "--inject-profile-logits"}
    shared |= {
        "--inject-progress",
        "--inject-evaluate",
        "--inject-from-scratch",
        "--inject-rollouts",
        "--inject-verify-inputs",
    }
    assert flags == shared | {flag.split()[0] for flag in PLAIN_ALONE}


def test_measuring_alone_wants_a_run_that_trains_nothing(recipe_file):
    ours = f"--inject-recipe {recipe_file} --inject-evaluate e.json"
    assert "the run trains; add --skip-train" in message_of(ours)


def test_flags_lost_to_yaml_cfg_are_noticed():
    args = ArgumentParser().parse_args([])
    assert recipe_from_args(args, ["--num-layers", "2"]) is None
    args.yaml_cfg = "model.yaml"
    assert recipe_from_args(args, ["--yaml-cfg", "model.yaml"]) is None
    with pytest.raises(RecipeError, match=r"--yaml-cfg model.yaml: .* --inject-recipe is lost"):
        recipe_from_args(args, ["--yaml-cfg", "model.yaml", "--inject-recipe", "r.yaml"])


def test_beside_megatron(recipe_file):
    """One parser, one namespace that pickles, and errors that name where a mistake is from."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_inject_arguments(parser)
    student = ["--num-layers", "8", "--num-experts", "16", "--data-path", "1", "en", "1", "code"]

    def run(line):
        args = parser.parse_args(student + shlex.split(line))
        assert pickle.loads(pickle.dumps(args)) == args
        return recipe_for_student(args)

    assert run("") is None
    recipe, facts = run(PLAIN)
    assert recipe.domains[0].experts.layers == {3: [0, 5]}
    assert facts.num_moe_experts == 16
    assert run(f"--inject-recipe {recipe_file}")[0].domains[0].name == "code"

    def error(line):
        with pytest.raises(RecipeError) as caught:
            run(line)
        return str(caught.value)

    assert error(f"{PLAIN} --inject-experts 3:16").startswith(
        "--inject-experts (layer 3): [16] names expert 16; experts are 0 to 15"
    )
    assert error(f"{PLAIN} --inject-domain-data 2").startswith("--inject-domain-data[0]: 2 is not")
    assert error(f"--inject-recipe {recipe_file} --use-megatron-fsdp").startswith("--use-megatron")
    recipe_file.write_text(RECIPE.replace("3: [0, 5]", "9: [0]"))
    assert error(f"--inject-recipe {recipe_file}").startswith(f"{recipe_file}: domains[0].experts")
    override = "domains[0].experts.layers=3:99"
    assert error(f"--inject-recipe {recipe_file} --inject-set '{override}'").startswith(
        f"--inject-set {override}: domains[0].experts.layers.3: [99] names expert 99"
    )


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("--inject-recipe r.yaml", "teachers.coder.source", "r.yaml: teachers.coder.source: no"),
        (
            "--inject-recipe r.yaml --inject-set teachers.coder={source: x}",
            "teachers.coder.source",
            "--inject-set teachers.coder={source: x}: teachers.coder.source: no",
        ),
        (PLAIN, "teachers.teacher.source", "--inject-teacher: no"),
        (PLAIN, "domains[0].experts.layers.3", "--inject-experts (layer 3): no"),
        (PLAIN, "--sft", "--sft: no"),
        ("--inject-recipe r.yaml", "--sft", "--sft: no"),
    ],
)
def test_errors_of_later_checks_are_named_once(line, key, expected):
    args = parse(line.replace("={source: x}", "='{source: x}'"))
    error = name_error(RecipeError(f"{key}: no", key), args)
    assert str(error) == expected
    assert str(name_error(error, args)) == expected


def test_a_profile_keeps_some_tokens_logits(recipe_file):
    line = f"--inject-recipe {recipe_file} --inject-profile p.json --inject-profile-logits"
    with pytest.raises(RecipeError, match="--inject-profile-logits: 0 is not a number of tokens"):
        recipe_from_args(parse(f"{line} 0"))
    assert recipe_from_args(parse(f"{line} 1")) is not None


@pytest.mark.parametrize("flag", ["--inject-profile-coselections", "--inject-profile-logits 8"])
def test_more_of_no_profile_is_an_error(recipe_file, flag):
    args = parse(f"--inject-recipe {recipe_file} {flag}")
    with pytest.raises(RecipeError, match=f"{flag.split()[0]}: no profile is recorded"):
        recipe_from_args(args)
