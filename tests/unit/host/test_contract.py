"""The contract with Megatron is whole: what the package uses stands in it, and Megatron has it."""

import ast
import dis
import enum
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_moe_inject import contracts
from megatron_moe_inject.host import compat, contract
from megatron_moe_inject.host.contract import (
    Contract,
    Hooked,
    Use,
    Wrapped,
    has_attribute,
    lacking,
    missing,
    resolve,
    unmet,
)
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.wrap_list import HOOKS, render_table
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.load import load_recipe
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION, PROFILE

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megatron_moe_inject"
OTHERS = {
    name: os.environ[name] for name in ("MEGATRON_OTHER", "MEGATRON_CHECKOUT") if name in os.environ
}
"""Folders with another Megatron: 0.18.2 (tests/run.sh puts it there), and a checkout, if named."""
ROWS = [use for contract in contracts.EVERYTHING for use in contract.uses]
FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("uses.py", "lane_uses.py", "contracts.py")
)


def is_module(path):
    try:
        importlib.import_module(path)
    except ImportError:
        return False
    return True


class Uses(ast.NodeVisitor):
    """What a file uses of Megatron: dotted names, and the keywords that each is called with.

    Names that are imported are followed through attributes, as long as these are of modules and
    classes, and through ``getattr``, ``hasattr`` and ``setattr`` with a name that is written out.
    """

    def __init__(self):
        self.scopes = [{}]
        self.found = {}

    def add(self, path, keywords=()):
        if not path.rpartition(".")[2].startswith("__"):
            self.found.setdefault(path, set()).update(keywords)

    def visit_FunctionDef(self, node):
        self.scopes.append({})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ImportFrom(self, node):
        if (node.module or "").split(".")[0] == "megatron":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                self.scopes[-1][alias.asname or alias.name] = path
                if not is_module(path):
                    self.add(path)

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] == "megatron":
                full = alias.name if alias.asname else "megatron"
                self.scopes[-1][alias.asname or "megatron"] = full

    def path(self, node):
        """The dotted name that an expression stands for, if it is of Megatron's."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), None)
        if isinstance(node, ast.Attribute) and (of := self.path(node.value)) is not None:
            parent = resolved(of)
            if isinstance(parent, ModuleType) or inspect.isclass(parent):
                return f"{of}.{node.attr}"
        return None

    def visit_Attribute(self, node):
        path = self.path(node)
        if path is not None and not is_module(path):
            self.add(path)
        self.generic_visit(node)

    def visit_Call(self, node):
        path = self.path(node.func)
        if path is not None and not is_module(path):
            self.add(path, (word.arg for word in node.keywords if word.arg))
        name = getattr(node.func, "id", None)
        if name in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
            of = self.path(node.args[0])
            if of is not None:
                self.add(f"{of}.{node.args[1].value}")
        self.generic_visit(node)


def resolved(path):
    try:
        return resolve(path)
    except (ImportError, AttributeError):
        return None


def uses(path):
    visitor = Uses()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.found


def same(use, path):
    """Whether a row is of what a dotted name stands for; modules hand names on to each other."""
    value = resolved(path)
    return use.path == path or (
        value is not None and callable(value) and resolved(use.path) is value
    )


def test_all_that_the_package_uses_of_megatron_is_in_the_contract():
    not_there = []
    for file in FILES:
        for path, keywords in uses(file).items():
            rows = [use for use in ROWS if same(use, path)]
            given = {name for use in rows for name in use.parameters}
            place = f"{file.relative_to(PACKAGE)}: {path}"
            if not rows:
                not_there.append(place)
            not_there += [f"{place}({name})" for name in sorted(keywords - given)]
    assert not_there == []


def test_uses_are_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import megatron.training\n"
        "from megatron.core import parallel_state as state, utils\n"
        "def f():\n"
        "    from megatron.core.process_groups_config import ProcessGroupCollection as G\n"
        "    G.use_mpu_process_groups(required_pgs=[])\n"
        "    return state.get_data_parallel_group(with_context_parallel=True)\n"
        "print(getattr(utils, 'unwrap_model'), megatron.training.get_args, G.x)\n"
    )
    groups = "megatron.core.process_groups_config.ProcessGroupCollection"
    assert uses(file) == {
        groups: set(),
        f"{groups}.use_mpu_process_groups": {"required_pgs"},
        "megatron.core.parallel_state.get_data_parallel_group": {"with_context_parallel"},
        "megatron.core.utils.unwrap_model": set(),
        "megatron.training.get_args": set(),
    }


def test_rows_name_what_the_package_mentions():
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    words = set(re.findall(r"\w+", text))
    named = {
        name
        for use in ROWS
        for name in (*use.parameters, *use.attributes, *([] if use.parameters else [use.name]))
        if not isinstance(use, Wrapped | Hooked)
    }
    named -= {use.name for use in ROWS if use.attributes}  # classes of objects that others make
    assert sorted(named - words) == []


def test_what_is_wrapped_is_wrapped_by_its_row():
    """Each row of something wrapped is used in one place at least, and nothing else takes the
    place of a method."""
    named, assigned = set(), []
    methods = {use.name for use in ROWS if isinstance(use, Wrapped)}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and file.name != "uses.py":
                named.add(node.id)
            targets = node.targets if isinstance(node, ast.Assign) else ()
            assigned += [
                f"{file.relative_to(PACKAGE)}:{node.lineno} {target.attr}"
                for target in targets
                if isinstance(target, ast.Attribute)
                and target.attr in methods
                and getattr(node.value, "attr", None) != target.attr  # handed on
            ]
    assert assigned == []
    constants = {
        name
        for module in ("host", "routing", "experts.train", "retention", "teachers")
        for name, value in vars(
            importlib.import_module(f"megatron_moe_inject.{module}.uses")
        ).items()
        if isinstance(value, Wrapped)
    }
    assert len(constants) > 25
    assert constants - named == set()


def test_overridden_methods_take_what_megatrons_take():
    from megatron_moe_inject.experts.train.pipeline import BoundaryCommunicator

    (stock,) = BoundaryCommunicator.__bases__
    overridden = [name for name in vars(BoundaryCommunicator) if callable(getattr(stock, name, 0))]
    assert "recv_backward" in overridden
    for name in set(overridden) - {"__init__"}:
        ours, theirs = getattr(BoundaryCommunicator, name), getattr(stock, name)
        assert list(inspect.signature(ours).parameters) == list(
            inspect.signature(theirs).parameters
        ), name


def test_hooks_are_of_a_kind_that_is_listed():
    kinds = {use.kind for use in ROWS if isinstance(use, Hooked)}
    assert kinds <= set(HOOKS.values())


def test_this_megatron_has_everything():
    assert missing(contracts.EVERYTHING) == []


@pytest.mark.parametrize("name", ["MEGATRON_OTHER", "MEGATRON_CHECKOUT"])
def test_another_megatron_has_everything(name):
    if name not in OTHERS:
        pytest.skip(f"{name} names no folder with another Megatron")
    code = (
        "import json; from megatron_moe_inject import contracts; "
        "from megatron_moe_inject.host import compat, contract; "
        "print(json.dumps([compat.megatron_version(), contract.missing(contracts.EVERYTHING)]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([OTHERS[name], str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    version, lacks = json.loads(done.stdout.strip().splitlines()[-1])
    assert version != compat.megatron_version()
    assert lacks == []


def test_what_is_said_to_be_new_is_there_from_that_version_on():
    """An optional row whose symbol was renamed would never be missed."""
    for use in ROWS:
        if use.optional == "0.19 and later":
            value = resolve(use.path)
            assert all(has_attribute(value, name) for name in use.attributes), use
        else:
            assert use.optional in ("", "0.20 and later"), use


def test_attributes_are_found_where_a_class_sets_registers_or_declares_them():
    class Base:
        declared: int

        @property
        def computed(self):
            return 1

    class Kind(Base):
        def __init__(self):
            self.made = 1
            self.register_buffer("registered", None)

        def later(self):
            print("printed")
            self.set_later = 2

        @classmethod
        def build(cls, parameter):
            parameter.given = 3

    found = ("declared", "computed", "made", "registered", "later", "set_later", "given")
    assert [name for name in (*found, "printed", "absent") if not has_attribute(Kind, name)] == [
        "printed",
        "absent",
    ]


def test_what_is_missing_is_named_once_with_its_parts_in_one_sentence():
    gone = Use("megatron.training.training.no_such_function")
    both = [
        Contract("steering", (gone, Use("megatron.training.no_such_module.f"))),
        Contract(
            "mixing",
            (
                gone,
                Use("megatron.training.training.train", ("model", "no_such_parameter")),
                Use("megatron.core.transformer.moe.router.TopKRouter", attributes=("no_such",)),
                Use("megatron.core.utils.not_there", optional="never"),
                Use("no_such_package.f", package="no_such_package"),
            ),
        ),
    ]
    assert unmet(both, "0.99", ("0.18", "0.19")) == (
        "megatron_moe_inject needs "
        "megatron.core.transformer.moe.router.TopKRouter.no_such (for mixing), "
        "megatron.training.no_such_module.f (for steering), "
        "megatron.training.training.no_such_function (for steering, mixing), "
        "megatron.training.training.train(no_such_parameter) (for mixing), which Megatron-Core "
        "0.99 does not have; supported: 0.18, 0.19"
    )
    assert unmet(both[:0], "0.99", ()) is None


def test_a_package_that_cannot_be_imported_is_not_taken_for_a_missing_symbol(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.training.wanting", None)
    (said,) = lacking(Use("megatron.training.wanting.f"))
    assert said == "megatron.training.wanting.f"


RECIPE = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {1: [0]}}}
teachers: {coder: {source: "hf:/x"}}
"""
WHOLE = """
objective: {gamma: 1.0}
retention: {experts: 0.1, l2: 0.1}
imitation: {hidden: 0.1}
steering: {coeff: 0.01, target_mass: 0.5}
train: {router_rows: true}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(str(path), [])

    return load


def test_the_parts_in_use_are_those_of_the_recipe_and_the_run(recipe):
    def parts(made, *known, **options):
        return {contract.part for contract in contracts.in_use(made, *known, **options)}

    always = {contract.part for contract in contracts.ALWAYS}
    small, whole = recipe(RECIPE), recipe(RECIPE + WHOLE)
    sets = "several validation sets"
    hybrid = {"--hybrid-layer-pattern", "train, with --hybrid-layer-pattern"}
    assert parts(small) == always | hybrid | {sets, "train", "--moe-grouped-gemm", "teachers"}
    assert parts(small, StudentFacts(4)) == always | {"train", "teachers"}
    student = StudentFacts(4, pattern=LayerPattern("*E*E"))
    assert parts(small, student) == always | hybrid | {"train", "teachers"}
    routing = "routing in the log and in profiles"
    assert parts(whole) - parts(small) == {
        "train.router_rows",
        "imitation",
        routing,
        "steering",
        "originals",
        "retention.experts",
        "retention.l2",
    }
    megatron = recipe(RECIPE.replace("hf:", "megatron:"))
    known = (megatron, StudentFacts(4))
    assert parts(*known, kind=EVALUATION) == always | {"teachers", "teachers from megatron:"}
    flags = Namespace(inject_profile="p.json")
    assert parts(whole, StudentFacts(4), flags, kind=PROFILE) == always | {routing}
    assert routing in parts(small, StudentFacts(4), flags)


def test_a_feature_of_another_package_brings_its_own_rows(recipe):
    class Counting(Feature):
        def uses(self, recipe, facts, args):
            return [Contract("counting", (Use("megatron.training.training.no_such"),))]

    parts = contracts.in_use(recipe(RECIPE), features=[Counting()])
    with pytest.raises(RecipeError, match=r"training\.no_such \(for counting\), which Megatron"):
        contracts.require(parts)


def test_a_run_is_refused_for_what_its_own_parts_need(recipe, monkeypatch):
    from megatron.core.transformer.moe.router import TopKRouter

    monkeypatch.delattr(TopKRouter, "_apply_seq_aux_loss")
    contracts.require(contracts.in_use(recipe(RECIPE), StudentFacts(4)))
    with pytest.raises(RecipeError) as error:
        contracts.require(contracts.in_use(recipe(RECIPE + WHOLE), StudentFacts(4)))
    name = "megatron.core.transformer.moe.router.TopKRouter._apply_seq_aux_loss (for steering)"
    assert f"needs {name}, which Megatron-Core {compat.megatron_version()}" in str(error.value)


def test_every_run_checks_its_features_before_they_start(recipe, monkeypatch):
    from megatron_moe_inject import run

    class Late(Feature):
        def uses(self, recipe, facts, args):
            return [Contract("late", (Use("megatron.training.training.no_such"),))]

        def start(self, run):
            raise AssertionError("started")

    monkeypatch.setattr(run, "student_facts_from_args", lambda args: StudentFacts(4))
    monkeypatch.setattr(run, "resolve_experts", lambda recipe, facts: recipe)
    monkeypatch.setattr(run, "check_recipe", lambda recipe, facts: None)
    with pytest.raises(RecipeError, match=r"no_such \(for late\)"):
        run.Run(INJECTION, recipe(RECIPE), Namespace(inject_dry_run=None), 61, {"late": Late()})


def test_installing_names_everything_that_is_missing_with_the_version(monkeypatch):
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training import training

    monkeypatch.delattr(training, "setup_model_and_optimizer")
    monkeypatch.setattr(GPTModel, "forward", lambda self, input_ids: None)
    with pytest.raises(ImportError) as error:
        contracts.require_always()
    for part in (
        "megatron.training.training.setup_model_and_optimizer",
        "megatron.core.models.gpt.gpt_model.GPTModel.forward(output_processor)",
        compat.megatron_version(),
        "0.18.2",
    ):
        assert part in str(error.value)


def test_the_table_of_a_plan_names_parts_methods_and_purposes(recipe):
    lines = render_table(contracts.in_use(recipe(RECIPE + WHOLE))).splitlines()
    assert lines[0].startswith("wraps")
    rows = [re.split(r"  +", line.strip()) for line in lines[1:]]
    assert ["steering", "TopKRouter.routing", "attaches the losses to the gates"] in rows
    assert [
        "train.router_rows",
        "TopKRouter state_dict pre-hook",
        "writes the rows into the whole router",
    ] in rows
    assert ["every run", "megatron.training.training.train"] in [row[:2] for row in rows]


def test_anothers_wrapper_that_hands_everything_on_lacks_nothing(monkeypatch):
    """Scripts and other tools put plain closures in the place of Megatron's functions."""
    from megatron.training import training

    use = Use("megatron.training.training.setup_model_and_optimizer", ("model_provider_func",))
    assert list(lacking(use)) == []
    monkeypatch.setattr(training, "setup_model_and_optimizer", lambda *args, **kwargs: None)
    assert list(lacking(use)) == []
    monkeypatch.setattr(training, "setup_model_and_optimizer", lambda provider: None)
    assert list(lacking(use)) == [f"{use.path}(model_provider_func)"]


def test_bytecode_is_read_as_dis_reads_it():
    """Also behind names and constants beyond the 256th, whose index takes more than one byte."""
    many = "".join(f"    self.a{i} = 'c{i}'\n" for i in range(300))
    space = {}
    exec(f"def many(self):\n{many}    setattr(self, 'last', 1)\n", space)
    kinds = (torch.nn.Module, torch.nn.MultiheadAttention, torch.optim.Adam, enum.Enum)
    functions = [f for kind in kinds for f in vars(kind).values() if inspect.isfunction(f)]
    found = []
    for function in (*functions, space["many"]):
        registers = {"register_buffer", "register_parameter", "setattr"} & set(
            function.__code__.co_names
        )
        found = [
            step.argval
            for step in dis.get_instructions(function)
            if step.opname == "STORE_ATTR"
            or (registers and step.opname == "LOAD_CONST" and isinstance(step.argval, str))
        ]
        assert list(contract._set_in(function)) == found, function
    assert len(found) == 601
