"""The pages: tables made from the code, links that lead somewhere, flags and messages there are."""

import ast
import re

import pytest

from tests.harness import covering_array as array
from tests.harness.docs import PACKAGE, ROOMS, ROOT, assert_exists, pages, readmes, rendered


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_code_gives(path):
    """Else: ``python -m tests.harness.docs``."""
    assert path.read_text(encoding="utf-8") == rendered(path)


def test_every_room_has_its_page_and_the_readme_leads_there():
    text = (ROOT / "README.md").read_text()
    for room in ROOMS:
        assert (PACKAGE / room / "README.md") in readmes()
        assert f"(megatron_moe_inject/{room}/README.md)" in text


def test_the_readme_is_read_in_one_go():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1800


def messages():
    """Every text of the package, what is put into it as ``...``."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    getattr(part, "value", "...") if isinstance(part, ast.Constant) else "..."
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_common_errors_are_what_the_code_says():
    _, _, errors = (ROOT / "README.md").read_text(encoding="utf-8").partition("| it says | do |")
    shown = re.findall(r"(?m)^\| `([^`]*)` \|", errors)
    assert len(shown) == 8
    texts = list(messages())
    for message in shown:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text) for text in texts), message


def test_every_command_of_the_pages_exists():
    from megatron_moe_inject.cli import _parser

    (commands,) = (a for a in _parser()._actions if a.dest == "command")
    texts = "".join(path.read_text(encoding="utf-8") for path in pages())
    used = set(re.findall(r"(?<!-)\bmoe-inject ([a-z][a-z-]*)", texts))
    used |= set(re.findall(r"megatron_moe_inject\.cli ([a-z][a-z-]*)", texts))
    assert {"plan", "profile", "select", "evaluate", "compare"} <= used
    assert used <= set(commands.choices), used - set(commands.choices)


def test_local_links_lead_somewhere():
    for path in pages():
        links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text(encoding="utf-8"))
        for link, anchor in links:
            target = path.parent / link if link else path
            assert target.exists(), (path, link)
            if anchor:
                headings = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
                known = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
                assert anchor[1:] in known, (path, link, anchor)


def test_every_flag_of_the_pages_exists():
    from argparse import ArgumentParser

    from megatron_moe_inject.recipe.flags import add_inject_arguments

    known = {
        flag
        for action in add_inject_arguments(ArgumentParser())._actions
        for flag in action.option_strings
    }
    texts = "".join(path.read_text(encoding="utf-8") for path in pages())
    used = set(re.findall(r"--inject-[a-z-]+[a-z]", texts))
    assert used
    assert used <= known, used - known


def support_matrix():
    """Row by row of ``tests/README.md``: its first cell, and what is named in the last."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    _, _, text = text.partition("| | supported | tested at | by |\n")
    rows = [line.strip("| \n").split(" | ") for line in text.split("\n\n")[0].splitlines()[1:]]
    return {cells[0]: re.findall(r"`([^`]+)`", cells[-1]) for cells in rows}


def array_features(named):
    """Features of the covering array that a row names, as in ``array: gamma, l2``."""
    if not named.startswith("array: "):
        return []
    return named.removeprefix("array: ").split(", ")


@pytest.mark.parametrize("row", support_matrix())
def test_what_is_supported_names_tests_that_there_are(row):
    assert support_matrix()[row]
    for named in support_matrix()[row]:
        features = array_features(named)
        assert set(features) <= array.FEATURES.keys()
        if not features:
            assert_exists(named)


def test_every_training_test_and_every_feature_is_in_the_matrix():
    named = [name for row in support_matrix().values() for name in row]
    files = {name.partition("::")[0] for name in named}
    there = {f"training/{path.name}" for path in (ROOT / "tests/training").glob("test_*.py")}
    assert there <= files
    assert {f for name in named for f in array_features(name)} == array.FEATURES.keys()
    assert len(support_matrix()) > 25
