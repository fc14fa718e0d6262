"""What carries an injection's identity is found wherever it lies, and nothing else is."""

import json
from argparse import Namespace

import pytest

from megatron_moe_inject.evaluation.evaluation_file import LIST, write_list
from megatron_moe_inject.evaluation.report.run_file import FILE, write_run
from megatron_moe_inject.host import lineage
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.lineage import Lineage, identity_of
from tests.harness.evaluations import evaluation
from tests.harness.run_lists import start

OURS, OTHER = "1dea" * 8, "beef" * 8
FOLDER = "inject_original"


def stored(identity=OURS, **kept):
    """What a checkpoint of the injection stores for it."""
    lineage = {"identity": identity, "kept": {}, "gate": None} | kept
    return {"inject_policy": {}, "inject_lineage": lineage}


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """Of a run that goes on from ``load/iter_0000004``; it saves in ``save``."""

    def make(found=None, load="load"):
        checkpoint = None if found is None else tmp_path / "load" / "iter_0000004"
        monkeypatch.setattr(
            lineage, "stored_argument", lambda args, name: (checkpoint, (found or {}).get(name))
        )
        return Lineage(Namespace(load=str(tmp_path / load), save=str(tmp_path / "save")))

    return make


def write(path, identity):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.startswith(FOLDER):
        path.mkdir()
        card = {"trains": {}} if identity is None else {"trains": {}, "injection": identity}
        (path / "trains.json").write_text(json.dumps(card))
    elif path.name.startswith("inject_run"):
        write_run(path, [start(injection=identity or "")])
    else:
        write_list(path, [evaluation({}, injection=identity or "")])
    return path


@pytest.mark.parametrize("name", [FOLDER, LIST, FILE])
def test_everything_carries_an_identity(tmp_path, name):
    assert identity_of(write(tmp_path / "a" / name, OURS)) == OURS
    assert identity_of(write(tmp_path / "b" / name, None)) == ""


def test_what_is_damaged_says_so(tmp_path):
    (tmp_path / LIST).write_text("")
    assert identity_of(tmp_path / LIST) is None
    (tmp_path / LIST).write_text("{\n")
    with pytest.raises(RecipeError, match="jsonl, line 1: is damaged or no JSON"):
        identity_of(tmp_path / LIST)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(RecipeError, match="inject_original: is damaged or no JSON"):
        identity_of(tmp_path / FOLDER)


@pytest.mark.parametrize("name", [FOLDER, LIST, FILE])
@pytest.mark.parametrize("place", ["load", "elsewhere", "kept", "save"])
def test_it_is_found_in_every_place_and_another_is_not_taken(tmp_path, going_on, name, place):
    run = going_on(stored(kept={name: str(tmp_path / "kept" / name)}), load="elsewhere")
    for other in {"load", "elsewhere", "kept", "save"} - {place}:
        write(tmp_path / other / name, OTHER)
    own = tmp_path / "save" / name
    assert run.find(own, name) is None
    mine = write(tmp_path / place / name, OURS)
    assert run.find(own, name) == mine
    assert run.find(own, name, own_first=True) == mine


def test_what_grows_is_taken_from_beside_the_checkpoint_and_what_does_not_from_the_save_folder(
    tmp_path, going_on
):
    run = going_on(stored())
    beside, own = (write(tmp_path / place / LIST, OURS) for place in ("load", "save"))
    assert run.find(own, LIST) == beside
    assert run.find(own, LIST, own_first=True) == own


@pytest.mark.parametrize(
    ("found", "identity"),
    [
        (None, None),
        ({}, None),
        ({"inject_policy": {}}, ""),
        (stored(""), ""),
        (stored(), OURS),
    ],
    ids=["no checkpoint", "a stock one", "an earlier version's", "and on from it", "ours"],
)
def test_an_injection_begins_where_no_checkpoint_knows_of_one(going_on, found, identity):
    run = going_on(found)
    assert run.identity == identity
    assert run.begins == (identity is None)


@pytest.mark.parametrize("name", [FOLDER, LIST, FILE])
def test_what_another_may_need_is_moved_aside_and_found_there(tmp_path, going_on, name):
    run = going_on(stored())
    own = write(tmp_path / "save" / name, OTHER)
    (tmp_path / "save" / "iter_0000002").mkdir()
    said = run.make_room(own)
    assert "belongs to another injection" in said
    aside = tmp_path / "save" / said.rpartition(" ")[2]
    assert not own.exists()
    assert identity_of(aside) == OTHER
    assert going_on(stored(OTHER)).find(own, name) == aside
    for _ in range(2):  # versions without identities may not be the same
        write(own, None)
        assert run.make_room(own)
    assert len(list(own.parent.glob(f"{own.stem}.*"))) == 3


@pytest.mark.parametrize("name", [FOLDER, LIST])
def test_what_nobody_can_need_is_replaced(tmp_path, going_on, name):
    """The first attempt came to no checkpoint, or it is our own."""
    own = write(tmp_path / "save" / name, OTHER)
    assert going_on(stored()).make_room(own) is None
    assert going_on(stored(OTHER)).make_room(own) is None
    assert [p for p in own.parent.iterdir() if p != own] == []
