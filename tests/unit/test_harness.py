"""What tests share stands in ``tests/harness``: no test module imports another, nor is imported."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def imported(source: str) -> set[str]:
    """Dotted names that a module may import, those inside functions and in strings of code too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + (node.module or "")}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {
                word.strip(",;()\"'")
                for line in node.value.splitlines()
                if "import" in line
                for word in line.split()
            }
    return names


def is_a_test(name: str) -> bool:
    """Whether a dotted name is that of a test module, a conftest or what stands in one."""
    parts = name.split(".")
    return parts[0] == "tests" and any(p == "conftest" or p.startswith("test_") for p in parts[1:])


def imported_tests(source: str) -> list[str]:
    return sorted(name for name in imported(source) if is_a_test(name) or name.startswith("."))


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_no_module_imports_a_test(folder):
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__).resolve()  # it has examples of what is wrong
        if (names := imported_tests(path.read_text(encoding="utf-8")))
    }
    assert wrong == {}, "move what they share to tests/harness"


@pytest.mark.parametrize(
    "source",
    [
        "from tests.unit.test_step import step_of",
        "from tests.training import lane, test_injection",
        "import tests.training.conftest",
        "def f():\n    from tests.unit.recipe import test_recipe",
        "from .test_step import step_of",
        "SCRIPT = 'import tests.unit.test_step'",
    ],
)
def test_an_import_of_a_test_is_found(source):
    assert imported_tests(source)


def test_an_import_of_the_harness_is_none():
    assert imported_tests("from tests.harness import lane") == []


def test_a_test_stands_in_a_room_of_the_package():
    """``tests/unit`` has the package's folders; what is tested of the hall stands on top."""
    rooms = {
        str(path.parent.relative_to(TESTS / "unit")) for path in (TESTS / "unit").rglob("test_*.py")
    }
    package = ROOT / "megatron_moe_inject"
    assert {room for room in rooms if not (package / room).is_dir()} == {"examples"}


def test_no_shared_module_stands_in_the_way_of_the_standard_librarys():
    """The launcher puts a script's folder first on the path, and scripts stand here."""
    names = {path.stem for path in (ROOT / "tests" / "harness").glob("*.py")}
    assert names & sys.stdlib_module_names == set()


@pytest.mark.parametrize(("left", "summary"), [(3600, "1 passed"), (-1, "1 skipped")])
def test_no_test_begins_when_the_time_is_over(left, summary):
    """What is left is skipped, and the run has not failed."""
    name = "tests/unit/test_harness.py::test_an_import_of_the_harness_is_none"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        cwd=ROOT,
        env=os.environ | {"TESTS_UNTIL": str(time.time() + left)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{summary} in" in done.stdout
