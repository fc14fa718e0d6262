"""The READMEs: tables that are made from the code, links that lead somewhere, flags that exist."""

import re

import pytest

from tests.docs import PACKAGE, ROOT, readmes, rendered
from tests.unit.test_rooms import ROOMS


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_code_gives(path):
    """Else: ``python -m tests.docs``."""
    assert path.read_text(encoding="utf-8") == rendered(path)


def test_every_room_has_its_page_and_the_readme_leads_there():
    text = (ROOT / "README.md").read_text()
    for room in ROOMS:
        assert (PACKAGE / room / "README.md") in readmes()
        assert f"(megatron_moe_inject/{room}/README.md)" in text


def test_local_links_lead_somewhere():
    for path in (ROOT / "README.md", *PACKAGE.rglob("README.md")):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))
        assert all((path.parent / link).exists() for link in links), links


def test_every_flag_of_the_readme_exists():
    from argparse import ArgumentParser

    from megatron_moe_inject.recipe.flags import add_inject_arguments

    known = {
        flag
        for action in add_inject_arguments(ArgumentParser())._actions
        for flag in action.option_strings
    }
    used = set(re.findall(r"--inject-[a-z-]+[a-z]", (ROOT / "README.md").read_text()))
    assert used
    assert used <= known, used - known
