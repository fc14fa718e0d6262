"""The page of the recipe: its recipe has all keys, defaults where it says so, and is valid."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_moe_inject.cli import main
from megatron_moe_inject.recipe.json_schema import recipe_schema

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "megatron_moe_inject" / "recipe" / "README.md"
SCHEMA = recipe_schema()
NOTHING = object()


def block(page):
    """The recipe of a page."""
    (found,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return found


@pytest.fixture(scope="module")
def text():
    return block(PAGE)


def resolved(schema):
    """The section that a value may be, of what a schema allows; else the schema itself.

    A schedule stands for a number, in the place of one.
    """
    name = schema.get("$ref", "").rpartition("/")[2]
    if name:
        return {} if name == "Schedule" else SCHEMA["$defs"][name]
    options = [resolved(option) for option in schema.get("anyOf", ())]
    return next((option for option in options if "properties" in option), schema)


def keys(schema, path="", seen=()):
    """Dotted keys of a recipe; what a list or a mapping holds has ``*`` in its place."""
    schema = resolved(schema)
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}{name}", inner
        yield from keys(inner, f"{path}{name}.")
    for inner in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from keys(inner, f"{path}*.")


KNOWN = dict(keys(SCHEMA))


def written(text):
    """The same keys of a text, each with its value and the line on which the value begins."""
    loader = yaml.SafeLoader(text)

    def walk(node, path):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if f"{path}{key.value}" in KNOWN else "*"
                plain = loader.construct_object(value, deep=True)
                yield f"{path}{name}", plain, key.start_mark.line
                yield from walk(value, f"{path}{name}.")
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                yield from walk(value, f"{path}*.")

    return list(walk(loader.get_single_node(), ""))


def differing(text):
    """Keys whose value is not the default, with the comment on their line."""
    lines = text.splitlines()
    for key, value, line in written(text):
        default = KNOWN.get(key, {}).get("default", NOTHING)
        if default is not NOTHING and value != default:
            yield key, lines[line].partition("#")[2]


def test_it_has_every_key(text):
    missing = set(KNOWN) - {key for key, _, _ in written(text)}
    assert not missing
    assert "teachers.*.window" in KNOWN
    assert "domains.*.experts.budget_of" in KNOWN


def test_what_is_no_default_is_marked_so(text):
    marked = dict(differing(text))
    assert marked["domains.*.experts.budget"].startswith(" default: null")
    for key, comment in marked.items():
        assert "default: " in comment, key


def test_a_missing_key_and_an_unmarked_value_are_noticed(text):
    without = re.sub(r"(?m)^  skip_worse:.*\n", "", text)
    assert set(KNOWN) - {key for key, _, _ in written(without)} == {"objective.skip_worse"}
    changed = text.replace("target_mass: 0.5 ", "target_mass: 0.6 ")
    assert "default" not in dict(differing(changed))["steering.target_mass"]


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=["page", "readme"])
def test_a_plan_takes_it(page, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block(page), encoding="utf-8")
    assert main(["plan", str(recipe)]) == 0, capsys.readouterr().err
