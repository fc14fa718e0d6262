"""How a run ends on a mistake: said once on each node, never lost, and shown by torchrun."""

import json
import threading

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_moe_inject.host import failure, meeting
from megatron_moe_inject.host.meeting import Meeting
from tests.harness.meetings import all_at_once, ranks


def test_all_ranks_get_what_the_first_decides():
    def together(own):
        found = own.decide(own.rank * 2, lambda said: said | {"from": own.rank})
        decided.append(found)

    decided, job = [], ranks(3)
    all_at_once(*(lambda own=own: together(own) for own in job))
    assert decided == [{"0": 0, "1": 2, "2": 4, "from": 0}] * 3


def test_ranks_that_say_nothing_in_time_are_missing():
    first, _, third = ranks(3, seconds=0.5)
    waiting = threading.Thread(target=third.decide, args=(2, None))  # and the second does not come
    waiting.start()
    assert first.decide(0, lambda said: sorted(said)) == [0, 2]
    waiting.join()


def test_each_message_is_said_by_one_rank_of_a_node(monkeypatch):
    job = ranks(3)
    assert [own.is_first("a mistake") for own in job] == [True, False, False]
    assert job[2].is_first("another mistake")
    monkeypatch.setattr("socket.gethostname", lambda: "another node")
    assert [own.is_first("a mistake") for own in job] == [True, False, False]


def test_no_message_is_lost_where_the_store_has_gone(monkeypatch):
    class Gone(dist.Store):
        def add(self, key, amount):
            raise dist.DistNetworkError("gone")

    class Hangs(dist.Store):
        def add(self, key, amount):
            threading.Event().wait(5)

    monkeypatch.setattr(meeting, "LEAVING_SECONDS", 0.1)
    monkeypatch.setattr(dist, "PrefixStore", lambda _, store: store)
    for store in (Gone(), Hangs(), None):
        assert Meeting(store, 1, 2, 1.0).is_first("a mistake")
    assert not Meeting(Gone(), 1, 2, 1.0).leave()


def test_leaving_waits_for_all_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(meeting, "LEAVING_SECONDS", 0.2)
    left, job = [], ranks(2)
    assert not job[0].leave()
    all_at_once(*(lambda own=own: left.append(own.leave()) for own in ranks(2)))
    assert left == [True, True]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_stands_out_and_torchrun_shows_it_last(tmp_path, monkeypatch, capsys, terminal):
    """Also where the rank that says it is not the first of those that torchrun finds failed."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(meeting, "LEAVING_SECONDS", 0.05)
    with pytest.raises(SystemExit) as ended:
        failure.end("domains: missing", ranks(2)[1])
    assert ended.value.code == 2
    line = "megatron_moe_inject: error: domains: missing"
    shown = f"\033[1;31m{line}\033[0m" if terminal else line
    assert capsys.readouterr().err == f"\n{shown}\n"
    assert json.loads(file.read_text())["message"]["message"] == line
    failures = {
        0: ProcessFailure(0, 101, -15, str(tmp_path / "none.json")),
        1: ProcessFailure(1, 102, 2, str(file)),
    }
    block = str(ChildFailedError("pretrain", failures)).splitlines()
    assert [text.strip() for text in block if text.strip()][-2] == line


def test_a_rank_with_nothing_to_say_says_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(meeting, "LEAVING_SECONDS", 0.05)
    first, second = ranks(2)
    assert first.is_first("domains: missing")
    with pytest.raises(SystemExit):
        failure.end("domains: missing", second)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "error.json").exists()
