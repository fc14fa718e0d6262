"""Layers in a recipe, a profile or a description of what trained, by blocks or by a pattern."""

import copy
from dataclasses import replace

import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.experts.choose.profile_numbers import in_numbers_of
from megatron_moe_inject.experts.train.described import in_layers_of
from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.model_parts import ParameterPlace
from megatron_moe_inject.recipe.layer_numbers import renumbered
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.routing.section import STEERING
from tests.harness.profiles import profile
from tests.harness.recipes import facts, message_of

PATTERN = LayerPattern("M*E|M*-*E")
TEXT = """
layer_numbers: gpt
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {layers: {0: [1], 2: [0, 3]}}
  - {name: math, data: [2], experts: {profile: p.json, method: top_n, n: 1, only_layers: [2]}}
teachers:
  coder: {source: "hf:/x", layers: {0: 5, 1: 7}}
objective: {alpha: 0.7, beta: 0.3}
imitation: {hidden: 0.1}
steering: {coeff: 0.1, target_mass: 0.5, layers: [2]}
train: {layers: [1], patterns: ["decoder.layers.2.mlp.router.weight"]}
"""


def test_blocks_become_layers():
    written = recipe_from_yaml(TEXT)
    before = copy.deepcopy(written)
    recipe = renumbered(written, PATTERN)
    assert written == before
    assert recipe.layer_numbers == "hybrid"
    assert recipe.domains[0].experts.layers == {2: [1], 7: [0, 3]}
    assert recipe.domains[1].experts.only_layers == [7]
    assert recipe.teachers["coder"].layers == {2: 5, 5: 7}
    assert recipe[STEERING].layers == [7]
    assert recipe.train.layers == [4, 5]
    assert recipe.train.patterns == ["gpt:decoder.layers.2.mlp.router.weight"]
    assert renumbered(recipe, PATTERN) == recipe


def test_the_plan_shows_both_numbers():
    recipe = recipe_from_yaml(NUMBERED)
    student = facts(pattern=PATTERN, num_layers=8, moe_layers=PATTERN.moe_layers)
    lines = render_plan(Plan(renumbered(recipe, PATTERN), student)).splitlines()
    table = lines[lines.index("experts") + 1 :][:3]
    assert [line.split() for line in table] == [
        ["domain", "layer", "(GPT", "block)", "experts"],
        ["code", "2", "(0)", "1"],
        ["code", "7", "(2)", "0,", "3"],
    ]
    assert "  8 layers M*EM*-*E, 16 experts in layers 2, 7" in lines


def test_numbers_of_the_student_stay():
    recipe = recipe_from_yaml(TEXT)
    assert renumbered(recipe, None) is recipe
    hybrid = replace(recipe, layer_numbers="hybrid")
    assert renumbered(hybrid, PATTERN) is hybrid
    unsaid = replace(recipe, layer_numbers=None)
    assert renumbered(unsaid, None) is unsaid
    assert renumbered(unsaid, LayerPattern("*E-")) == replace(recipe, layer_numbers="hybrid")


NUMBERED = """
layer_numbers: gpt
domains: [{name: code, data: [1], experts: {layers: {0: [1], 2: [0, 3]}}}]
objective: {alpha: 0, beta: 1}
"""
NAMELESS = """
domains: [{name: code, data: [1], experts: {profile: p.json, method: top_n, n: 1}}]
objective: {alpha: 0, beta: 1}
"""


def test_a_recipe_without_numbers_needs_no_word():
    assert renumbered(recipe_from_yaml(NAMELESS), PATTERN).layer_numbers == "hybrid"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("train: {layers: [1]}", "train.layers"),
        ("train: {patterns: ['decoder.layers.1.*']}", "train.patterns[0]"),
        ("steering: {coeff: 0.1, target_mass: 0.5, layers: [1]}", "steering.layers[0]"),
    ],
)
def test_a_number_without_a_word_is_an_error(line, key):
    text = NAMELESS + line
    message = message_of(lambda: renumbered(recipe_from_yaml(text), PATTERN))
    assert message.startswith(f"layer_numbers: missing, and {key} names a layer")
    assert "block 0 = layers 1 and 2, block 1 = layers 4 and 5" in message
    assert renumbered(recipe_from_yaml(text), LayerPattern("*E-")).layer_numbers == "hybrid"


def test_mistakes():
    recipe = recipe_from_yaml(TEXT)

    def said(changed, pattern):
        return message_of(lambda: renumbered(changed, pattern))

    assert said(recipe, LayerPattern("*E-")).startswith("layer_numbers: 'gpt' counts blocks")
    assert "write gpt" in said(replace(recipe, layer_numbers="hybrid"), None)
    few = said(recipe, LayerPattern("*E*E"))
    assert few.startswith("domains[0].experts.layers.2: 2 is no block of the student; in *E*E")
    unknown = TEXT.replace("layer_numbers: gpt", "layer_numbers: megatron")
    assert message_of(lambda: recipe_from_yaml(unknown)).startswith("layer_numbers: 'megatron'")


def test_patterns_of_blocks_match_by_the_names_of_a_gpt_model():
    policy = FreezePolicy({}, frozenset(), patterns=("gpt:decoder.layers.1.mlp.*", "*.layers.0.*"))
    places = [
        ParameterPlace("a", "router", 4, None, "decoder.layers.4.mlp.b", "decoder.layers.1.mlp.b"),
        ParameterPlace("a", "mamba", 0, None, "decoder.layers.0.mixer.b"),
        ParameterPlace("a", "router", 1, None, "decoder.layers.1.mlp.b", "decoder.layers.0.mlp.b"),
    ]
    assert [policy.matches(place) for place in places] == [
        ["gpt:decoder.layers.1.mlp.*"],
        ["*.layers.0.*"],
        [],
    ]


def test_what_trained_in_a_gpt_model():
    described = {
        "experts": {"0": [1], "2": [0, 3]},
        "components": ["router"],
        "layers": [1],
        "patterns": ["*.a"],
        "router_rows": {"2": [0]},
    }
    assert in_layers_of(described, PATTERN) == {
        "experts": {"2": [1], "7": [0, 3]},
        "components": ["router"],
        "layers": [4, 5],
        "patterns": ["gpt:*.a"],
        "router_rows": {"7": [0]},
    }
    assert in_layers_of({"experts": "all"}, PATTERN) == {"experts": "all"}
    other = {"experts": {"7": [1]}, "layers": [9]}
    assert in_layers_of(other, PATTERN) == other
    assert in_layers_of(described, LayerPattern("*E-")) is described


def test_profiles_take_the_numbers_of_the_run():
    gpt = profile(moe_layers=(0, 1, 2))
    hybrid = in_numbers_of(gpt, LayerPattern("*EM*E*E"), "key", "p.json")
    assert hybrid.provenance.moe_layers == [1, 4, 6]
    assert hybrid.provenance.num_layers == 7
    assert in_numbers_of(hybrid, LayerPattern("*E|M*E|*E"), "key", "p.json") is hybrid
    back = in_numbers_of(hybrid, None, "key", "p.json")
    assert back.provenance == gpt.provenance
    assert back.classes is gpt.classes

    def said(*of):
        return message_of(lambda: in_numbers_of(*of, "key", "p.json"))

    assert "with the layers *EM*E*E, and this one has *E*E*E" in said(
        hybrid, LayerPattern("*E*E*E")
    )
    assert "of a GPT model of 3 blocks, and this student has 2" in said(gpt, LayerPattern("*E*E"))
    assert "do not take turns" in said(gpt, LayerPattern("*E-"))


@pytest.fixture
def profiles(tmp_path):
    """Of the same tokens, by a GPT model and by a hybrid one."""
    gpt = profile(moe_layers=(0, 1, 2))
    files = tmp_path / "gpt.json", tmp_path / "hybrid.json"
    write_profile(files[0], gpt)
    write_profile(files[1], in_numbers_of(gpt, LayerPattern("*EM*E*E"), "key", "p.json"))
    return [str(file) for file in files]


@pytest.mark.parametrize("hybrid_first", [False, True])
def test_a_report_has_the_numbers_of_its_first_profile(profiles, tmp_path, capsys, hybrid_first):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(NUMBERED.replace("0: [1], 2: [0, 3]", "2: [3]"))
    files = profiles[::-1] if hybrid_first else profiles
    assert main(["routing-report", *files, "--domain", "code", "--recipe", str(recipe)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row and row[0].isdigit()]
    assert [row[0] for row in rows] == (["1", "4", "6"] if hybrid_first else ["0", "1", "2"])
    on_targets = [row[0] for row in rows if len(row) > 6]
    assert on_targets == [rows[-1][0]], "the chosen expert is in the last layer"


def test_chosen_layers_of_a_pattern_say_so(profiles, capsys):
    for file, said in zip(profiles, (False, True), strict=True):
        assert main(["select", file, "--domain", "code", "--method", "top_n", "--n", "1"]) == 0
        printed = capsys.readouterr().out
        assert ("layers of *EM*E*E: write layer_numbers: hybrid" in printed) is said
