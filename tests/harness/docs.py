"""Tables of the READMEs that are made from the code.

    python -m tests.harness.docs          writes them anew

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``tests/unit/test_readme.py``
compares each with what the code gives.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_moe_inject"
ROOMS = (
    "host", "losses", "recipe", "data", "teachers", "experts", "convert", "adapters", "routing",
    "retention", "preference", "evaluation", "rollouts", "planning",
)  # fmt: skip
"""From the ground up; what stands in none of them is the hall and the doors, above all."""
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


def first_line(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast_of(path)) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".").replace("|", "\\|")


def files(folder: Path) -> str:
    """Modules of a folder and of the folders in it, each with what it is; empty packages aside. A
    folder with a page of its own is one row, the page's title."""
    rows = ["| file | what it is |", "|---|---|"]
    pages = {page.parent: page for page in folder.rglob("README.md") if page.parent != folder}
    for inner, page in pages.items():
        name = inner.relative_to(folder)
        title = page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        rows.append(f"| [`{name}/`]({name}/README.md) | {title} |")
    for path in sorted(folder.rglob("*.py")):
        line = first_line(path)
        told = pages.keys().isdisjoint(path.parents)
        if told and (path.name != "__init__.py" or (line and path.parent != folder)):
            rows.append(f"| `{path.relative_to(folder)}` | {line} |")
    rows[2:] = sorted(rows[2:], key=lambda row: row.split("`")[1])
    return "\n".join(rows) + "\n"


def architectures(folder: Path) -> str:
    """Model types that are converted, with what their tables say of themselves and what Megatron's
    models they become, in their usual configuration."""
    from transformers import AutoConfig

    from megatron_moe_inject.convert.architectures import ARCHITECTURES

    rows = ["| `model_type` | which models | layouts |", "|---|---|---|"]
    for name in sorted(ARCHITECTURES.names()):
        table = ARCHITECTURES[name]
        layouts = table.layouts(AutoConfig.for_model(name))
        about = " ".join((type(table).__doc__ or "").split("\n\n")[0].split())
        if layouts:
            rows.append(f"| `{name}` | {_cell(about.rstrip('.'))} | {', '.join(layouts)} |")
    return "\n".join(rows) + "\n"


def hall(folder: Path) -> str:
    """Modules of the package that stand in no room."""
    rows = ["| file | what it is |", "|---|---|"]
    rows += [f"| `{path.name}` | {first_line(path)} |" for path in sorted(PACKAGE.glob("*.py"))]
    return "\n".join(rows) + "\n"


def commands(folder: Path) -> str:
    """The commands of ``moe-inject``, as its own parser describes them."""
    from megatron_moe_inject.cli import _parser

    rows = ["| command | what it does |", "|---|---|"]
    for action in _parser()._actions:
        for choice in getattr(action, "_choices_actions", ()):
            rows.append(f"| `moe-inject {choice.dest}` | {_cell(choice.help)} |")
    return "\n".join(rows) + "\n"


def flags(folder: Path) -> str:
    """The plugin's flags, as its own parser describes them."""
    from argparse import ArgumentParser

    from megatron_moe_inject.recipe.flags import add_inject_arguments

    parser = add_inject_arguments(ArgumentParser(add_help=False))
    rows = ["| flag | what it does |", "|---|---|"]
    for action in parser._actions:
        value = f" {action.metavar}" if action.metavar else ""
        more = " ..." if action.nargs == "+" else ""
        rows.append(f"| `{action.option_strings[0]}{value}{more}` | {_cell(action.help or '')} |")
    return "\n".join(rows) + "\n"


def refused(folder: Path) -> str:
    """Megatron's options that a recipe does not go with, by what they do not go with."""
    from megatron_moe_inject.recipe.features import FEATURES
    from megatron_moe_inject.recipe.refused_options import REFUSED

    settings: dict[tuple[str, str], list[str]] = {}
    for option in REFUSED:
        settings[option.flag, option.reason] = ["any recipe"]
    for feature in FEATURES:
        for refusal in feature.refuses:
            for option in refusal.options:
                settings.setdefault((option.flag, option.reason), []).append(refusal.setting)
    options: dict[tuple[str, str], list[str]] = {}
    for (flag, reason), beside in sorted(settings.items()):
        options.setdefault(("; ".join(beside), reason), []).append(f"`{flag}`")
    rows = ["| with | Megatron's option is refused | since it |", "|---|---|---|"]
    rows += [
        f"| {_cell(beside)} | {', '.join(flags)} | {_cell(reason)} |"
        for (beside, reason), flags in sorted(options.items(), key=_any_recipe_first)
    ]
    return "\n".join(rows) + "\n"


def _any_recipe_first(row: tuple[tuple[str, str], list[str]]) -> tuple[bool, str, list[str]]:
    (beside, _), flags = row
    return beside != "any recipe", beside, flags


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES: dict[str, Callable[[Path], str]] = {
    "architectures": architectures,
    "commands": commands,
    "files": files,
    "flags": flags,
    "hall": hall,
    "refused": refused,
}


def rendered(path: Path) -> str:
    """A README with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]](path.parent) + match[4]

    return _TABLE.sub(table, path.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """All pages."""
    folders = ("megatron_moe_inject", "patches", "examples", "tests")
    return [
        ROOT / "README.md",
        ROOT / ".github" / "CONTRIBUTING.md",
        *(p for f in folders for p in sorted((ROOT / f).rglob("README.md"))),
    ]


def readmes() -> list[Path]:
    """Pages with tables of ours."""
    return [path for path in pages() if _TABLE.search(path.read_text(encoding="utf-8"))]


def assert_exists(named: str) -> None:
    """That a test is there, by its file alone or as ``unit/test_step.py::test_a_step``, one of a
    class as ``training/test_array_rows.py::TestRows::test_a_row``.

    Raises:
        AssertionError: no such file under ``tests/``, or no such function or class in it.
    """
    file, *inside = named.split("::")
    path = ROOT / "tests" / file
    assert path.name.startswith("test_"), f"{named}: names no tests"
    assert path.is_file(), f"{named}: no file {path}"
    if not inside:
        return
    *owner, name = inside
    assert name.startswith("test_"), f"{named}: names no test"
    functions = _methods(path, *owner) if owner else _functions(ast_of(path))
    assert name in functions, f"{named}: no such function in {path}"


def ast_of(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _functions(node: ast.AST) -> set[str]:
    return {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}


def _methods(path: Path, name: str) -> set[str]:
    """Methods of a class of a module, and those that it has from a class of the harness."""
    tree = ast_of(path)
    places = {
        alias.name: ROOT.joinpath(*(node.module or "").split(".")).with_suffix(".py")
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            found |= _functions(node)
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in places:
                    found |= _methods(places[base.id], base.id)
    return found


def main() -> None:
    """Write all tables."""
    for path in readmes():
        path.write_text(rendered(path), encoding="utf-8")


if __name__ == "__main__":
    main()
