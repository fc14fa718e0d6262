"""The recipe as a JSON Schema: what it takes, what it refuses, that all of it is described."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.json_schema import recipe_schema
from megatron_moe_inject.recipe.load import recipe_from_yaml

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).resolve().parents[3]
TEACHER = "teachers.a.source=hf:/dir"
MINIMAL = {"domains": [{"name": "code", "data": [1], "experts": {"layers": {"3": [0, 5]}}}]}


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def as_json(recipe):
    """YAML's keys may be numbers, JSON's may not."""
    return json.loads(json.dumps(recipe))


def recipes():
    """Every recipe file, and every block of a page that is one."""
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "domains:" in text:
            yield pytest.param(text, id=path.name)
    for path in [ROOT / "README.md", *sorted((ROOT / "megatron_moe_inject").rglob("README.md"))]:
        blocks = re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
        for number, text in enumerate(blocks):
            if "domains:" in text:
                yield pytest.param(text, id=f"{path.parent.name}-{number}")


@pytest.mark.parametrize("text", recipes())
def test_every_recipe_in_the_repository_is_valid(validator, text):
    validator.validate(as_json(yaml.safe_load(text)))


def without(key, value):
    return {**MINIMAL, key: value}


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        ({}, []),
        (without("objectives", {}), []),
        (without("objective", {"divergence": "kl"}), ["objective", "divergence"]),
        (without("objective", {"alpha": "high"}), ["objective", "alpha"]),
        (without("train", {"experts": "some"}), ["train", "experts"]),
        (without("steering", {"layers": ["first"]}), ["steering", "layers", 0]),
    ],
)
def test_mistakes_are_found_where_they_stand(validator, recipe, at):
    validator.validate(as_json(MINIMAL))
    errors = list(validator.iter_errors(as_json(recipe)))
    assert [list(error.absolute_path) for error in errors] == [at]
    with pytest.raises(RecipeError):
        recipe_from_yaml(yaml.safe_dump(recipe))


@pytest.mark.parametrize("layers", ["12:3,40;13:1", "3:0"])
def test_compact_forms_and_schedules(validator, layers):
    recipe = as_json(MINIMAL)
    recipe["domains"][0]["experts"]["layers"] = layers
    recipe["objective"] = {"alpha": {"points": {"0": 0.0, "500": 0.7}, "shape": "cosine"}}
    validator.validate(recipe)
    recipe["domains"][0]["experts"] = layers
    validator.validate(recipe)
    recipe["objective"]["alpha"]["shape"] = "square"
    assert not validator.is_valid(recipe)


def test_every_field_is_described_and_every_choice_is_a_field():
    schema = recipe_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    switches = set(sections["Train"]["properties"]) - {"experts", "frozen_experts"}
    for name, section in sections.items():
        for field, found in section["properties"].items():
            plain = name == "Train" and field in switches
            told = "description" in found or "$ref" in found or plain or field == "version"
            assert told, f"{name}.{field}"
    steering, train = sections["Steering"]["properties"], sections["Train"]["properties"]
    assert train["experts"]["enum"] == ["selected", "all", "none"]
    assert steering["confidence"]["enum"] == ["none", "label", "top"]
    assert None in sections["ExpertChoice"]["properties"]["score"]["enum"]
    assert None not in sections["ExpertChoice"]["properties"]["method"]["enum"]  # it asks for one


def test_descriptions_say_the_choices_and_not_what_the_source_calls_them():
    schema = recipe_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, found in section["properties"].items():
            text = found.get("description", "")
            assert not re.search(r"``[A-Z_]{4,}``", text), f"{name}.{key}: {text}"
            # A key's own choices stand in its text, but for the one that is off.
            offered = [choice for choice in found.get("enum", ()) if choice not in (None, "none")]
            if text:
                assert all(choice in text for choice in offered), f"{name}.{key}: {text}"


def test_defaults_are_those_of_the_recipe():
    recipe = recipe_from_yaml(yaml.safe_dump(MINIMAL), ["domains[0].teacher=a", TEACHER])
    objective = recipe_schema()["$defs"]["Objective"]["properties"]
    for spec in dataclasses.fields(recipe.objective):
        value = getattr(recipe.objective, spec.name)
        if not dataclasses.is_dataclass(value):
            assert objective[spec.name]["default"] == value


def test_the_command_writes_it(tmp_path, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
    target = tmp_path / "recipe.json"
    assert main(["schema", "--output", str(target)]) == 0
    assert json.loads(target.read_text()) == recipe_schema()
    assert str(target) in capsys.readouterr().out
