"""The README's guided tour names every module, and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_moe_inject"


def toured() -> set[str]:
    """Files in the tour's table; ``a/{b,c}.py`` stands for several."""
    text = (ROOT / "README.md").read_text()
    table = text.split("## Guided tour", 1)[1].split("\n## ", 1)[0]
    names = set()
    for cell in re.findall(r"^\| `([^`]+)` \|", table, flags=re.M):
        group = re.fullmatch(r"(.*)\{(.*)\}(.*)", cell)
        parts = [cell] if group is None else [group[1] + x + group[3] for x in group[2].split(",")]
        names |= set(parts)
    return names


def test_the_tour_matches_the_tree():
    modules = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
    }
    named = toured()
    assert {name for name in named if name.startswith("megatron_moe_inject/")} == modules
    assert all((ROOT / name).exists() for name in named)


def test_local_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all((ROOT / link).exists() for link in links), links


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
