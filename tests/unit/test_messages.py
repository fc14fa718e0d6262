"""No rank gets an object of every rank, but where this list says why that stays small."""

import ast
from pathlib import Path

import megatron_moe_inject

PACKAGE = Path(megatron_moe_inject.__file__).parent
ALLOWED = {
    "host/agreement.py union_of_names": "a hundred names of a rank, in an error",
    "experts/train/verify.py verify": "six names of a rank, in an error",
    "experts/train/optimizer_state.py sharded_state_dict": "two numbers of an optimizer, at a save",
    "evaluation/measurement.py collect": "sums of each measured sequence, once",
    "host/wrap_list.py render_in_place": "counts by class and method, in a dry run",
}


def gathers():
    """Calls of ``all_gather_object`` over the whole world, by file and function."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr == "all_gather_object"
                    and not any(word.arg == "group" for word in call.keywords)
                ):
                    yield f"{path.relative_to(PACKAGE)} {function.name}"


def test_every_gather_of_objects_over_the_whole_world_is_known_to_stay_small():
    found = set(gathers()) - {"experts/train/optimizer_state.py make_checkpointable"}
    assert found == set(ALLOWED)


def test_no_group_is_made_by_its_members_alone():
    """Before torch 2.14 they name it by how many groups they are in, and wait for each other."""
    users = [
        path.name
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and any(word.arg == "use_local_synchronization" for word in call.keywords)
    ]
    assert users == []
