"""The rooms of the package: imports go down only, between files and between rooms, without a ring.

Imports inside functions and for type checking count as well.
"""

import ast
from pathlib import Path

from tests.harness.docs import ROOMS

PACKAGE = "megatron_moe_inject"
ROOT = Path(__file__).resolve().parents[2]
MOST_IN_THE_HALL = 10


def modules():
    """Dotted name in the package -> path; the package itself is ''."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """Modules of the package that a file names in an import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not getattr(node, "level", 0), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            base = node.module.removeprefix(PACKAGE).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name.removeprefix(PACKAGE).lstrip(".")


MODULES = modules()
ARROWS = {
    name: {target for target in imports(path, MODULES) if target != name}
    for name, path in MODULES.items()
}


def floor(name):
    room = name.partition(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def folder(name):
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def rings(arrows):
    """Sets of two or more nodes that reach each other."""

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for target in arrows.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return seen

    reach = {node: reached(node) for node in arrows}
    return {
        tuple(sorted(other for other in reach[node] if node in reach.get(other, ())))
        for node in arrows
        if node in reach[node]
    }


def test_no_arrow_goes_up():
    up = [
        f"{name} imports {target}"
        for name, targets in ARROWS.items()
        for target in targets
        if floor(target) > floor(name)
    ]
    assert up == []


def test_no_ring_of_files():
    assert rings(ARROWS) == set()


def test_no_ring_of_folders():
    between = {}
    for name, targets in ARROWS.items():
        for target in targets:
            if folder(name) != folder(target):
                between.setdefault(folder(name), set()).add(folder(target))
    assert rings(between) == set()


def test_the_rooms_are_there_and_the_hall_is_short():
    top = {name.partition(".")[0] for name in MODULES if "." in name}
    assert top == set(ROOMS)
    assert len([name for name in MODULES if "." not in name and name not in ROOMS]) <= (
        MOST_IN_THE_HALL
    )


def test_a_ring_is_found():
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {("a", "b", "c")}
