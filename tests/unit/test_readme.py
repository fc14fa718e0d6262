"""The READMEs: tables that are made from the code, links that lead somewhere, flags that exist."""

import re

import pytest

from tests.harness.docs import PACKAGE, ROOMS, ROOT, pages, readmes, rendered


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
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


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
