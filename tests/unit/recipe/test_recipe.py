"""The recipe file: its defaults, every mistake, overrides."""

import os

import pytest

from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.recipe.expert_choice import ExpertChoice, parse_experts
from megatron_moe_inject.recipe.load import dump_recipe, load_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.schedule import Schedule, value_at
from megatron_moe_inject.recipe.schema import Domain, Objective, Recipe, TeacherSpec, Train
from tests.harness.recipes import message_of, text_with


def test_good_recipe_and_its_defaults():
    recipe = recipe_from_yaml(text_with({}))
    assert recipe == Recipe(
        domains=[
            Domain("code", [1], "coder", ExpertChoice({3: [0, 5]})),
            Domain("math", ["/d/math"], None, ExpertChoice({3: [5], 7: [1]})),
        ],
        teachers={"coder": TeacherSpec("megatron:/ckpt/coder", None, "params", 0)},
        objective=Objective("forward_kl", 1.0, 0.7, 0.3, None, 0.0),
        train=Train(experts="selected"),
        verify_frozen=False,
    )
    assert recipe.train.components() == []
    assert recipe.general_beta() == 0.3
    assert recipe.temperature(recipe.domains[0]) == 1.0
    assert recipe.experts_by_layer() == {3: [0, 5], 7: [1]}
    assert recipe.teachers["coder"].kind == "megatron"
    assert recipe.teachers["coder"].path == "/ckpt/coder"


def by(**changes):
    """Experts of domain 0 by profile, with fields replaced."""
    return {
        "domains.0.experts": {"profile": "p.json", "method": "token", "threshold": 0.2} | changes
    }


MISTAKES = [
    # unknown keys, at any depth, with the closest known one
    ({"domain": []}, ["domain: unknown key", "did you mean domains?"]),
    ({"domains.0.nme": "x"}, ["domains[0].nme: unknown key", "did you mean name?"]),
    ({"domains.1.experts.layer": {}}, ["domains[1].experts.layer:", "did you mean layers?"]),
    ({"teachers.coder.temprature": 1}, ["teachers.coder.temprature:", "mean temperature?"]),
    ({"objective.lamda": 1}, ["objective.lamda: unknown key", "keys here: divergence"]),
    ({"train.routers": True}, ["train.routers:", "did you mean router?"]),
    ({"3": 4}, ["3: unknown key"]),
    # wrong types
    ({"version": "1"}, ["version: '1' is not an integer", "without quotes"]),
    ({"version": 2}, ["version: 2", "version: 1"]),
    ({"domains": {"code": {}}}, ["domains: {'code': {}} is not a list", "domains: [...]"]),
    ({"domains": None}, ["domains: None is not a list"]),
    ({"domains.0": "code"}, ["domains[0]: 'code' is not a mapping", "name, data"]),
    ({"domains.0.name": 5}, ["domains[0].name: 5 is not a string", "quote it"]),
    ({"domains.0.data": 1}, ["domains[0].data: 1 is not a list", "data: [...]"]),
    ({"domains.0.data": [1.5]}, ["domains[0].data[0]: 1.5 is not an integer or a string"]),
    ({"domains.0.data": [True]}, ["domains[0].data[0]: True", "it is a bool"]),
    (
        {"domains.0.teacher": ["coder"]},
        ["domains[0].teacher: ['coder'] is not a string or a mapping or null"],
    ),
    ({"domains.0.experts.layers": [3]}, ["domains[0].experts.layers: [3] is not a mapping"]),
    ({"domains.0.experts.layers": {"a": [1]}}, ["domains[0].experts.layers.a:", "an integer"]),
    ({"domains.0.experts.layers": {3: 5}}, ["domains[0].experts.layers.3: 5 is not a list"]),
    ({"domains.0.experts.layers": {3: ["x"]}}, ["layers.3[0]: 'x' is not an integer"]),
    ({"domains.0.experts.layers": {3: [2**70]}}, ["layers.3[0]:", "is too large"]),
    ({"domains.0.experts.layers": {3: [1], "3": [2]}}, ["domains[0].experts.layers.3:", "3"]),
    ({"domains.0.experts.layers": 723}, ["experts.layers: 723", 'as in "12:3"']),
    ({"domains.0.experts": 723}, ["domains[0].experts: 723", 'as in "12:3"']),
    ({"domains.0.experts": "3-5:1"}, ["domains[0].experts: '3-5:1' has the part", "12:3,40"]),
    ({"domains.0.experts": True}, ["domains[0].experts: True is not a mapping", '"3:0,5"']),
    ({"teachers": ["coder"]}, ["teachers: ['coder'] is not a mapping"]),
    ({"teachers.coder": "megatron:/x"}, ["teachers.coder: 'megatron:/x' is not a mapping"]),
    ({"teachers.coder.window": 1.5}, ["teachers.coder.window: 1.5 is not an integer"]),
    ({"teachers.coder.temperature": "hot"}, ["teachers.coder.temperature: 'hot' is not a number"]),
    ({"objective.alpha": True}, ["objective.alpha: True is not a number"]),
    ({"objective": [1]}, ["objective: [1] is not a mapping"]),
    ({"train.router": 1}, ["train.router: 1 is not true or false"]),
    ({"train.router": None}, ["train.router: None is not true or false"]),
    ({"verify_frozen": "yes"}, ["verify_frozen: 'yes' is not true or false"]),
    # missing
    ({"domains": ...}, ["domains: missing", "at least one domain"]),
    ({"domains.0.name": ...}, ["domains[0].name: missing", "name: code"]),
    ({"domains.1.data": ...}, ["domains[1].data: missing", "data: [1]"]),
    ({"teachers.coder.source": ...}, ["teachers.coder.source: missing", "hf:/dir"]),
    ({"teachers.coder.source": "???"}, ["teachers.coder.source", "Missing mandatory value"]),
    # values
    ({"domains": []}, ["domains: [] is empty", "at least one domain"]),
    ({"domains.0.name": "a b"}, ["domains[0].name: 'a b'", "letters, digits"]),
    ({"domains.0.name": "general"}, ["domains[0].name: 'general' is already", "another name"]),
    ({"domains.1.name": "code"}, ["domains[1].name: 'code'", "name of domains[0]", "another"]),
    ({"domains.0.data": []}, ["domains[0].data: [] is empty", "[1]"]),
    ({"domains.0.data": [-1]}, ["domains[0].data[0]: -1 is negative", "count from 0"]),
    ({"domains.0.data": [""]}, ["domains[0].data[0]: '' is empty", "path prefix"]),
    ({"domains.1.data": [1]}, ["domains[1].data[0]: 1", "claimed by domains[0].data[0]"]),
    ({"domains.0.data": [2, 2]}, ["domains[0].data[1]: 2", "claimed by domains[0].data[0]"]),
    ({"general_data": ["/d/math"]}, ["general_data[0]:", "claimed by domains[1].data[0]"]),
    ({"domains.0.teacher": "codr"}, ["domains[0].teacher: 'codr'", "did you mean coder?"]),
    ({"domains.0.experts.layers": {-1: [0]}}, ["layers.-1: -1 is a negative layer"]),
    ({"domains.0.experts.layers": {3: []}}, ["domains[0].experts.layers.3: [] chooses no expert"]),
    ({"domains.0.experts.layers": {3: [1, 1]}}, ["layers.3: [1, 1] lists expert 1 twice"]),
    ({"domains.0.experts.layers": {3: [-2]}}, ["layers.3: [-2] has the negative id -2"]),
    ({"domains.0.experts.layers": {}}, ["domains[0].experts.layers: {}", "train.experts to all"]),
    ({"domains.0.experts": None}, ["domains[0].experts.layers: {} chooses no experts"]),
    ({"domains.0.experts.layers": "3:1;3:2"}, ["layers: '3:1;3:2' names layer 3 twice"]),
    ({"domains.0.experts.layers": "3-5:1"}, ["layers: '3-5:1' has the part '3-5:1'", "12:3,40"]),
    # experts by profile
    (by(layers={3: [1]}), ["domains[0].experts.layers: {3: [1]} stands beside a profile", "keep"]),
    (by(origin="x"), ["domains[0].experts.origin: 'x' stands beside a profile"]),
    (
        by(profile=None),
        ["experts.method: 'token' needs a profile", "write domains[0].experts.prof"],
    ),
    (by(profile=""), ["domains[0].experts.profile: '' is no file"]),
    (by(profile=5), ["domains[0].experts.profile: 5 is not a string or null"]),
    (by(method=None), ["domains[0].experts.method: missing; choose token, gate, contrast, top_n"]),
    (by(method="tokens"), ["experts.method: 'tokens' is not known; did you mean token?"]),
    (by(threshold=None), ["experts.threshold: missing; method token needs it", "threshold: 0.2"]),
    (by(threshold=0), ["domains[0].experts.threshold: 0.0 is not in (0, 1]"]),
    (by(threshold=1.01), ["domains[0].experts.threshold: 1.01 is not in (0, 1]"]),
    (by(n=2), ["experts.n: 2 is not used by method token; it takes threshold"]),
    (by(method="top_n"), ["threshold: 0.2 is not used by method top_n; it takes n, score"]),
    (by(method="top_n", threshold=None), ["experts.n: missing; method top_n needs it", "n: 4"]),
    (by(method="top_n", threshold=None, n=0), ["experts.n: 0 is too small; write 1 or more"]),
    (by(method="budget", threshold=None), ["experts.budget: missing", "as in budget: 0.1"]),
    (by(method="budget", threshold=None, budget=2), ["experts.budget: 2.0 is not in (0, 1]"]),
    (
        by(method="budget", threshold=None, budget=0.1, budget_of="some"),
        ["experts.budget_of: 'some' is not known", "routed, all"],
    ),
    (
        by(method="top_n", threshold=None, n=2, score="tokens"),
        ["experts.score: 'tokens' is not known", "token, gate, contrast"],
    ),
    (by(score="gate"), ["experts.score: 'gate' is not used by method token"]),
    (by(at_least=-1), ["experts.at_least: -1 is too small"]),
    (by(at_most=0), ["experts.at_most: 0 is too small; write 1 or more"]),
    (by(at_least=3, at_most=2), ["experts.at_most: 2 is below at_least; raise it or lower"]),
    (by(method="top_n", threshold=None, n=3, at_most=2), ["at_most: 2 is below n"]),
    (by(method="top_n", threshold=None, n=1, at_least=2), ["at_least: 2 is above n"]),
    (by(ep=0), ["experts.ep: 0 is too small"]),
    (by(only_layers=[3, -1]), ["experts.only_layers[1]: -1 is negative"]),
    (by(only_layers=[3, 3]), ["experts.only_layers[1]: 3 is named twice"]),
    (by(only_layers=3), ["experts.only_layers: 3 is not a list"]),
    (by(treshold=1), ["experts.treshold: unknown key; did you mean threshold?"]),
    ({"teachers.coder.source": "/ckpt"}, ["teachers.coder.source: '/ckpt'", "megatron:/dir"]),
    ({"teachers.coder.source": "disk:/x"}, ["teachers.coder.source: 'disk:/x'", "hf:/dir"]),
    ({"teachers.coder.source": "hf:"}, ["teachers.coder.source: 'hf:' is no source"]),
    ({"teachers.coder.temperature": 0}, ["teachers.coder.temperature: 0.0 is not positive"]),
    ({"teachers.coder.dtype": "fp16"}, ["teachers.coder.dtype: 'fp16'", "params, fp32, bf16"]),
    ({"teachers.coder.window": -1}, ["teachers.coder.window: -1 is negative", "0 keeps"]),
    ({"teachers.coder.prefix": "boss"}, ["teachers.coder.prefix: 'boss'", "did you mean bos"]),
    ({"teachers.coder.prefix": []}, ["teachers.coder.prefix: [] is empty", "write none"]),
    ({"teachers.coder.prefix": [2, -1]}, ["teachers.coder.prefix[1]: -1 is negative"]),
    ({"teachers.coder.prefix": ["a"]}, ["teachers.coder.prefix[0]: 'a' is not an integer"]),
    ({"teachers.coder.prefix": 2}, ["teachers.coder.prefix: 2 is not a string or a list"]),
    ({"teachers.coder.prefix": None}, ["teachers.coder.prefix: None is not a string or a list"]),
    ({"teachers.b.c": 1}, ["teachers.b.c: unknown key"]),
    ({"teachers.old": {"source": "hf:/x"}}, ["teachers.old: 'hf:/x' is used by no domain"]),
    ({"teachers.a/b": {"source": "hf:/x"}}, ["teachers: 'a/b' is no name"]),
    ({"objective.divergence": "forward_lk"}, ["'forward_lk'", "did you mean forward_kl"]),
    ({"objective.temperature": 0.0}, ["objective.temperature: 0.0 is not positive", "above 0"]),
    ({"objective.temperature": -1}, ["objective.temperature: -1.0 is not positive"]),
    ({"objective.alpha": -0.1}, ["objective.alpha: -0.1 is negative", "0 or more"]),
    ({"objective.beta": -1}, ["objective.beta: -1.0 is negative"]),
    ({"objective.general_beta": -1}, ["objective.general_beta: -1.0 is negative"]),
    ({"objective.alpha": float("nan")}, ["objective.alpha: nan is not finite"]),
    ({"objective.beta": float("inf")}, ["objective.beta: inf is not finite"]),
    ({"objective.gamma": -0.1}, ["objective.gamma: -0.1 is negative", "0 or more"]),
    ({"objective.alpha": 0, "objective.beta": 0}, ["objective.alpha: 0 and objective.beta: 0"]),
    (
        {"domains.0.teacher": None, "teachers": {}},
        ["objective.alpha: 0.7", "no domain has a teacher", "set alpha to 0"],
    ),
    ({"objective.beta": 0}, ["domains[1].teacher: None", "'math' without a loss", "beta above 0"]),
    ({"objective.jsd_beta": 1}, ["objective.jsd_beta: 1.0 is not between", "are the limits"]),
    ({"objective.skew": 0}, ["objective.skew: 0.0 is not between 0 and 1"]),
    ({"objective.confidence": "high"}, ["confidence: 'high'", "none, label, entropy"]),
    ({"objective.skip_worse": 1}, ["objective.skip_worse: 1 is not true or false"]),
    ({"objective.masked_sum": "no"}, ["objective.masked_sum: 'no' is not true or false"]),
    ({"objective.kernels": "triton"}, ["objective.kernels: 'triton'", "auto", "torch"]),
    ({"objective.ce_share": 0.3}, ["objective.ce_share: 0.3 stands beside", "keep one form"]),
    (
        {"objective": {"ce_share": 1.5}},
        ["objective.ce_share: 1.5 is not between 0 and 1", "30 % CE"],
    ),
    (
        {"objective": {"ce_share": {"points": {0: 0.9, 50: 1.5}}}},
        ["objective.ce_share.points.50: 1.5 is not between 0 and 1"],
    ),
    (
        {"objective.ce_share": {"points": {0: 0.9, 50: 0.2}}},
        ["objective.ce_share: Schedule(points={0: 0.9, 50: 0.2}"],
    ),
    ({"objective.alpha": {"points": {}}}, ["objective.alpha.points: {} is empty"]),
    ({"objective.alpha": {"shape": "linear"}}, ["objective.alpha.points: missing"]),
    ({"objective.alpha": {"points": {0: 1}, "shap": 1}}, ["alpha.shap: unknown", "mean shape?"]),
    ({"objective.alpha": {"points": {0: 1}, "shape": "cubic"}}, ["'cubic'", "linear, cosine"]),
    ({"objective.alpha": {"points": {-5: 1}}}, ["points: -5 is negative", "count from 0"]),
    ({"objective.alpha": {"points": {0: 1, 9: -2}}}, ["objective.alpha: -2.0 is negative"]),
    ({"objective.alpha": {"points": {"x": 1}}}, ["points.x", "is not an integer"]),
    ({"objective.alpha": [1]}, ["objective.alpha: [1] is not a number or a schedule"]),
    ({"domains.0.alpha": -1}, ["domains[0].alpha: -1.0 is negative"]),
    ({"domains.1.alpha": 1}, ["domains[1].alpha: 1.0 weighs a teacher", "domains[1].teacher"]),
    ({"domains.0.temperature": 0}, ["domains[0].temperature: 0.0 is not positive"]),
    ({"domains.1.beta": 0}, ["domains[1].teacher: None", "'math' without a loss"]),
    (
        {"domains.0.alpha": 0, "domains.0.beta": 0},
        ["domains[0].alpha: 0 and domains[0].beta: 0", "domain 'code' without a loss"],
    ),
    ({"train.experts": "some"}, ["train.experts: 'some'", "selected, all, none"]),
    ({"train.experts": "none"}, ["train.experts: 'none'", "nothing to train", "router"]),
]


@pytest.mark.parametrize(("changes", "parts"), MISTAKES)
def test_mistake_names_key_value_and_remedy(changes, parts):
    message = message_of(lambda: recipe_from_yaml(text_with(changes)))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "domains"]),
        ("# only a comment", ["empty"]),
        ("- a\n- b", ["sequence, not a mapping"]),
        ("domains", ["scalar, not a mapping"]),
        ("domains: [\n  {name: a\n", ["not valid YAML: line"]),
        ("a: 1\nb: [}\n", ["line 2"]),
        ("version: 1\nversion: 1", ["line 2", "duplicate key"]),
        ("a: &a [*a]", ["recursive"]),
        ("a: !!python/object/apply:os.system [ls]", ["line 1", "python/object"]),
        ("a: 0b_", ["not valid YAML", "quote the value"]),
        ("a: {[1]: 2}", ["line 1"]),
        ("a: \x00", ["not valid YAML"]),
        ("{null: 1}", ["NoneType"]),
        ("[" * 2000, ["nested too deeply"]),
        ("version: ${nope}", ["version", "nope"]),
        ("version: ${oc.env:NO_SUCH_VARIABLE_HERE}", ["version", "NO_SUCH_VARIABLE_HERE"]),
        ("version: '${x'", ["version"]),
        ("a: ${b}\nb: ${a}", ["a"]),
    ],
)
def test_yaml_that_is_no_recipe(text, parts):
    message = message_of(lambda: recipe_from_yaml(text))
    for part in parts:
        assert part in message


def test_file_errors_name_the_file(tmp_path):
    missing = tmp_path / "nope.yaml"
    assert f"{str(missing)!r} cannot be read (No such file" in message_of(
        lambda: load_recipe(missing)
    )
    assert "Is a directory" in message_of(lambda: load_recipe(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    assert "not UTF-8 text" in message_of(lambda: load_recipe(binary))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text_with({"objective.alpa": 1}))
    assert message_of(lambda: load_recipe(wrong)).startswith(f"{wrong}: objective.alpa: unknown")


def test_interpolation_and_scientific_floats():
    text = text_with({"objective.alpha": "${objective.beta}"}).replace("0.3", "5e-1")
    recipe = recipe_from_yaml(text)
    assert recipe.objective.alpha == recipe.objective.beta == 0.5


def test_environment_variables_can_be_used(monkeypatch):
    monkeypatch.setenv("CKPT_DIR", "/somewhere")
    source = "megatron:${oc.env:CKPT_DIR}/coder"
    recipe = recipe_from_yaml(text_with({"teachers.coder.source": source}))
    assert recipe.teachers["coder"].source == "megatron:/somewhere/coder"


def test_empty_sections_take_defaults():
    recipe = recipe_from_yaml(text_with({"train": None}))
    assert recipe.train == Train()


COMPACT = """
domains:
  - name: code
    data: [1]
    experts: {}
objective: {{alpha: 0, beta: 1}}
general_data: ["3:0,5;4:1"]
"""


@pytest.mark.parametrize("written", ["'3:0, 5 ;4:1'", "3:0,5;4:1", "${general_data[0]}"])
def test_experts_in_compact_form(written):
    """As the README's recipe has it, quoted or not, and by interpolation."""
    recipe = recipe_from_yaml(COMPACT.format(written))
    assert recipe.experts_by_layer() == {3: [0, 5], 4: [1]}
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe


def test_compact_experts():
    assert parse_experts("12:3,40;13:1") == {12: [3, 40], 13: [1]}
    assert parse_experts(" 0 : 7 ; 2:1, 2 ") == {0: [7], 2: [1, 2]}
    recipe = recipe_from_yaml(text_with({"domains.0.experts.layers": "12:3,40;13:1"}))
    assert recipe.domains[0].experts.layers == {12: [3, 40], 13: [1]}
    for wrong in (
        "",
        "12",
        "12:",
        ":3",
        "12:3;",
        "12:3,",
        "12:a",
        "-1:3",
        "1:-3",
        "all:3",
        "1:2:3",
    ):
        assert "12:3,40" in message_of(lambda wrong=wrong: parse_experts(wrong))


OVERRIDES = [
    ("teachers.coder.temperature=2", lambda r: r.teachers["coder"].temperature == 2.0),
    ("domains[0].name=python", lambda r: r.domains[0].name == "python"),
    ("domains.0.name=python", lambda r: r.domains[0].name == "python"),
    ("domains[0].data=[0,/x]", lambda r: r.domains[0].data == [0, "/x"]),
    ("domains[0].data[0]=4", lambda r: r.domains[0].data == [4]),
    ("domains[0].experts.layers.3=[9]", lambda r: r.domains[0].experts.layers == {3: [9]}),
    (
        "domains[0].experts.layers.4=[9]",
        lambda r: r.domains[0].experts.layers == {3: [0, 5], 4: [9]},
    ),
    ("domains[0].experts=12:3", lambda r: r.domains[0].experts == ExpertChoice({12: [3]})),
    ("domains[0].experts=3:0,5;4:1", lambda r: r.experts_by_layer()[4] == [1]),
    ("domains[0].experts.layers=12:3", lambda r: r.domains[0].experts.layers == {12: [3]}),
    (
        "domains[0].experts.layers=1:2;3:4",
        lambda r: r.domains[0].experts.layers == {1: [2], 3: [4]},
    ),
    ("domains[0].experts.layers={1: [2]}", lambda r: r.domains[0].experts.layers == {1: [2]}),
    ("objective.beta=1e-3", lambda r: r.objective.beta == 0.001),
    ("objective.general_beta=null", lambda r: r.objective.general_beta is None),
    ("objective={alpha: 1, beta: 2}", lambda r: r.objective == Objective(alpha=1, beta=2)),
    ("train.router=true", lambda r: r.train.components() == ["router"]),
    ("train.experts=all", lambda r: r.train.experts == "all"),
    ("teachers.coder={source: 'hf:/m'}", lambda r: r.teachers["coder"] == TeacherSpec("hf:/m")),
    ("teachers.coder.source=hf:/a=b", lambda r: r.teachers["coder"].path == "/a=b"),
]


@pytest.mark.parametrize(
    "choice",
    [
        {"method": "token", "threshold": 1},
        {"method": "contrast", "threshold": 0.2, "at_least": 1, "at_most": 8, "ep": 4},
        {"method": "top_n", "n": 2, "score": "contrast", "only_layers": [4, 3], "domain": "x"},
        {"method": "budget", "budget": 0.05, "budget_of": "all", "at_least": 0},
    ],
)
def test_experts_by_profile_survive_a_round_trip(choice):
    recipe = recipe_from_yaml(text_with({"domains.0.experts": {"profile": "no.json", **choice}}))
    assert recipe.domains[0].experts == ExpertChoice(profile="no.json", **choice)
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe
    with pytest.raises(AssertionError, match="resolve_experts comes first"):
        recipe.experts_by_layer()


def test_weights_and_temperatures_by_domain():
    changes = {"domains.0.alpha": 0.9, "domains.0.temperature": 4, "domains.1.beta": 2}
    recipe = recipe_from_yaml(text_with({**changes, "teachers.coder.temperature": 3}))
    code, math = recipe.domains
    assert (recipe.alpha(code), recipe.beta(code), recipe.temperature(code)) == (0.9, 0.3, 4)
    assert (recipe.alpha(math), recipe.beta(math), recipe.temperature(math)) == (0, 2, 1)
    assert recipe.general_beta() == 0.3


def test_share_of_cross_entropy_is_a_shortcut():
    recipe = recipe_from_yaml(text_with({"objective": {"ce_share": 0.25}}))
    assert recipe.alpha(recipe.domains[0]) == 0.75
    assert recipe.beta(recipe.domains[0]) == recipe.general_beta() == 0.25


def test_a_share_of_cross_entropy_may_fall():
    """What it leaves is the teacher's, at every iteration."""
    falls = {"points": {0: 0.9, 100: 0.2}, "shape": "cosine"}
    recipe = recipe_from_yaml(text_with({"objective": {"ce_share": falls}}))
    for iteration in (0, 13, 50, 99, 100, 1000):
        alpha, beta = (
            value_at(weight(recipe.domains[0]), iteration) for weight in (recipe.alpha, recipe.beta)
        )
        assert alpha + beta == pytest.approx(1, abs=1e-12)
    assert (recipe.beta(recipe.domains[0]).at(0), recipe.general_beta().at(100)) == (0.9, 0.2)
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe


def test_weights_may_be_schedules():
    ramp = {"points": {0: 0, 100: 0.5}, "shape": "cosine"}
    recipe = recipe_from_yaml(
        text_with({"objective.alpha": ramp}),
        ["objective.general_beta={points: {10: 1, 20: 2}}"],
    )
    assert recipe.alpha(recipe.domains[0]) == Schedule({0: 0.0, 100: 0.5}, "cosine")
    assert recipe.general_beta() == Schedule({10: 1.0, 20: 2.0}, "linear")
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(("override", "holds"), OVERRIDES)
def test_override(override, holds):
    assert holds(recipe_from_yaml(text_with({}), [override]))


def test_overrides_apply_in_order():
    overrides = ["teachers.b.source=hf:/b", "teachers.b.temperature=3", "domains[1].teacher=b"]
    recipe = recipe_from_yaml(text_with({}), overrides)
    assert recipe.temperature(recipe.domains[1]) == 3.0
    assert recipe.domains[1].teacher == "b"
    twice = ["objective.alpha=1", "objective.alpha=2"]
    assert recipe_from_yaml(text_with({}), twice).objective.alpha == 2.0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("teachers.codr.temperature=2", ["teachers.codr.temperature: no teacher 'codr'", "coder?"]),
        ("objective.alpa=1", ["objective.alpa: unknown key", "did you mean alpha?"]),
        ("domains[7].name=x", ["domains[7].name: no such place"]),
        ("domains.x.name=y", ["domains.x.name: no such place"]),
        ("domains[0].data[3]=4", ["domains[0].data[3]: no such place"]),
        ("objective.alpha", ["not KEY=VALUE", "objective.alpha=0.7"]),
        ("=1", ["not KEY=VALUE"]),
        ("a..b=1", ["not KEY=VALUE"]),
        ("domains[0=1", ["not KEY=VALUE"]),
        ("objective.alpha=[", ["not valid YAML"]),
        ("objective.alpha=x", ["objective.alpha: 'x' is not a number"]),
        ("objective.alpha.x=1", ["objective.alpha: 0.7 has no keys", "objective.alpha.x"]),
        ("objective.alpha.x.y=1", ["objective.alpha: 0.7 has no keys"]),
        ("domains[0].name[0]=1", ["domains[0].name: 'code' has no keys"]),
        ("objective.alpha=-1", ["objective.alpha: -1.0 is negative"]),
        ("objective.alpha=", ["objective.alpha: None is not a number"]),
        ("domains[0].experts.layers=12:x", ["domains[0].experts.layers: '12:x'"]),
        ("domains[0].experts.layers.3=5", ["domains[0].experts.layers.3: 5 is not a list"]),
        ("domains.0.experts.layers.3=[5,5]", ["lists expert 5 twice"]),
    ],
)
def test_wrong_override_is_named(tmp_path, override, parts):
    path = tmp_path / "recipe.yaml"
    path.write_text(text_with({}))
    message = message_of(lambda: load_recipe(path, ["train.router=true", override]))
    assert message.startswith(f"--inject-set {override}") or repr(override) in message
    for part in parts:
        assert part in message


def test_mistakes_of_the_file_are_not_blamed_on_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text_with({"objective.alpha": -1}))
    message = message_of(lambda: load_recipe(path, ["objective.beta=1"]))
    assert message.startswith(f"{path}: objective.alpha")


def test_evaluation_is_off_unless_it_is_written():
    assert recipe_from_yaml(text_with({}))[EVALUATION] is None
    on = recipe_from_yaml(text_with({}), ["evaluation={}"])[EVALUATION]
    assert (on.file, on.gate) == (None, True)
    changed = recipe_from_yaml(text_with({}), ["evaluation.gate=false", "evaluation.file=e.jsonl"])
    assert (changed[EVALUATION].file, changed[EVALUATION].gate) == ("e.jsonl", False)
    assert recipe_from_yaml(dump_recipe(changed)) == changed
    for override, part in (
        ("evaluation.gate=maybe", "evaluation.gate: 'maybe' is not true or false"),
        ("evaluation.gait=true", "evaluation.gait: unknown key; did you mean gate?"),
        ("evaluation.file=''", "evaluation.file: '' is no file"),
    ):
        assert part in message_of(lambda o=override: recipe_from_yaml(text_with({}), [o]))


def test_nothing_in_a_recipe_is_executed(tmp_path):
    target = tmp_path / "made"
    text = f"domains: !!python/object/apply:os.mkdir ['{target}']"
    message_of(lambda: recipe_from_yaml(text))
    assert not os.path.exists(target)
