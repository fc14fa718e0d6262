"""What happens to texts when servers fail, against real servers that fail as asked."""

import queue
import random
import time

import numpy as np
import pytest

from megatron_moe_inject.teachers.served import pool
from megatron_moe_inject.teachers.served.address import parse_addresses
from megatron_moe_inject.teachers.served.pool import Pool, log_probs_of_text
from megatron_moe_inject.teachers.served.wire import Settings
from tests.harness.teacher_server import TeacherServer, random_thinker

VOCAB = 50
THINK = random_thinker(VOCAB)
TOP = 6


def text(number, length=12):
    """Ids of which every third is what the model finds most likely."""
    tokens = np.random.default_rng(number).integers(0, VOCAB, length).astype(np.int32)
    for place in range(2, length, 3):
        tokens[place] = THINK(tokens[:place].tolist())[-1].argmax()
    return tokens


class Asking:
    """A pool, and what it tells."""

    def __init__(self, *servers, key=None, **changes):
        addresses = [address for s in servers for address in parse_addresses(s.url, None)]
        usual = {"protocol": servers[0].protocol, "model": "tiny", "top": TOP, "timeout": 5.0,
                 "patience": 20.0, "concurrent": 3}  # fmt: skip
        self.told = queue.Queue()
        self.remarks = []
        put = self.told.put
        self.pool = Pool(
            Settings(tuple(addresses), **{**usual, **changes}),
            key,
            lambda number, answer: put((number, answer)),
            lambda number, why: put((number, why)),
            self.remarks.append,
        )
        self.pool.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.close()

    def results(self, count, seconds=30):
        """What became of so many texts, by number."""
        until = time.monotonic() + seconds
        return dict(self.told.get(timeout=until - time.monotonic()) for _ in range(count))

    def outcome(self, number=1, tokens=None):
        """What becomes of one text that is needed."""
        self.pool.ask(number, text(number) if tokens is None else tokens)
        self.pool.need(number)
        return self.results(1)[number]


def assert_right(answer, tokens):
    log_probs = THINK(tokens.tolist())[:-1]
    used = answer.ids >= 0
    assert used.sum(1).min() >= TOP
    rows = np.arange(len(log_probs))[:, None]
    expected = log_probs[rows, np.where(used, answer.ids, 0)]
    assert np.array_equal(np.where(used, expected, -np.inf), answer.log_probs)
    own = log_probs_of_text(answer, tokens)
    assert np.array_equal(own, log_probs[rows[:, 0], tokens[1:]])


PASSING = ["500", "503", "429", "closed", "garbage", "other_json", "truncated", "half", "few",
           "other_tokens", "shorter", "nan", "raw_logits"]  # fmt: skip


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_nothing_but_time(protocol, fault):
    with TeacherServer(THINK, protocol, faults=lambda n: fault if n == 0 else None) as server:
        with Asking(server) as asking:
            assert_right(asking.outcome(), text(1))
        assert len(server.asked) == 2
        assert any("asked again" in remark for remark in asking.remarks)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "says HTTP 500: as the test asks: 500"),
        ("closed", "closed the connection (RemoteDisconnected"),
        (2.0, "gave no answer within 0.3 s"),
    ],
)
def test_patience_ends(fault, says):
    """Only for a text that a step waits for."""
    with (
        TeacherServer(THINK, faults=lambda n: fault) as server,
        Asking(server, timeout=0.3, patience=0.5) as asking,
    ):
        asking.pool.ask(7, text(7))
        with pytest.raises(queue.Empty):
            asking.results(1, seconds=1.5)
        asking.pool.need(7)
        assert f"{server.url} {says}" in asking.results(1)[7]


@pytest.mark.parametrize(
    ("fault", "says", "texts"),
    [
        ("garbage", "answered 24 bytes that are no JSON", 0),
        ("nan", "sent an answer that has NaN for log-probabilities", 4),
        ("other_tokens", "sent an answer that is about other tokens than were sent", 4),
        ("shorter", "sent an answer that is about 11 tokens, where 12 were sent", 4),
        ("few", "has 5 ids at a place, where 6 were asked for", 4),
        ("raw_logits", "which are no log-probabilities at temperature 1", 4),
        ("400", "refuses it (HTTP 400: as the test asks: 400)", 1),
        ("404", "has no /v1/completions for this model (HTTP 404: as the test asks: 404)", 1),
        ("redirect", "sends on to http://elsewhere.invalid/v1/completions; name that URL", 1),
    ],
)
def test_a_fault_that_stays_is_the_reason(fault, says, texts):
    """What no waiting mends ends at once, with few requests."""
    with TeacherServer(THINK, faults=lambda n: fault) as server:
        with Asking(server, patience=1.0 if not texts else 30.0) as asking:
            assert says in asking.outcome()
        assert not texts or len(server.asked) == texts


def test_others_do_the_work_of_a_server_that_dies_and_it_comes_back():
    probe = text(99)
    says = log_probs_of_text_of(probe)
    with TeacherServer(THINK) as first, TeacherServer(THINK) as second:
        with Asking(first, second, probe=tuple(probe.tolist()), probe_log_probs=says) as asking:
            for number in range(20):
                asking.pool.ask(number, text(number))
            for number, answer in asking.results(20).items():
                assert_right(answer, text(number))
            assert first.asked
            assert second.asked
            second.stop()
            for number in range(20, 40):
                asking.pool.ask(number, text(number))
                asking.pool.need(number)
            assert set(asking.results(20)) == set(range(20, 40))
            first.stop()
            second.start()
            assert_right(asking.outcome(50), text(50))
            assert second.asked[-2] == probe.tolist()
        assert [r for r in asking.remarks if r == f"{second.url} answers again"]


def log_probs_of_text_of(tokens):
    return tuple(THINK(tokens.tolist())[np.arange(len(tokens) - 1), tokens[1:]].tolist())


def test_a_server_that_comes_back_with_another_model_is_asked_no_more():
    probe = text(99)
    with TeacherServer(THINK, faults=lambda n: "500" if n == 0 else None) as server:
        says = log_probs_of_text_of(probe)
        server.think = random_thinker(VOCAB, seed=1)
        with Asking(server, probe=tuple(probe.tolist()), probe_log_probs=says) as asking:
            assert "came back with another model" in asking.outcome()


def test_a_refused_key_and_what_the_server_repeats_of_it():
    with TeacherServer(THINK, key="right") as server:
        with Asking(server, key="wrong-and-secret") as asking:
            why = asking.outcome()
        assert "refuses the key, or wants one (HTTP 401: Unauthorized: Bearer ***)" in why
        assert "secret" not in why + "".join(asking.remarks)
        with Asking(server, key="right") as asking:
            assert_right(asking.outcome(), text(1))


def test_one_server_without_the_model_leaves_the_work_to_the_other():
    with TeacherServer(THINK, model="other") as first, TeacherServer(THINK) as second:
        with Asking(first, second) as asking:
            for number in range(12):
                asking.pool.ask(number, text(number))
            for number, answer in asking.results(12).items():
                assert_right(answer, text(number))
        assert not first.asked
        assert len(second.asked) == 12


def test_texts_that_a_step_waits_for_come_first_and_dropped_ones_never():
    with TeacherServer(THINK, seconds=0.05) as server:
        with Asking(server, concurrent=1) as asking:
            for number in range(10):
                asking.pool.ask(number, text(number))
            asking.pool.need(9)
            asking.pool.drop(5)
            asking.results(9)
        order = [next(n for n in range(10) if text(n).tolist() == t) for t in server.asked]
        assert order.index(9) <= 2
        assert 5 not in order


def test_as_many_at_once_as_were_asked_for():
    with TeacherServer(THINK, seconds=0.1) as server:
        with Asking(server, concurrent=5) as asking:
            for number in range(15):
                asking.pool.ask(number, text(number))
            asking.results(15)
        assert server.together == 5


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_faults_at_random(protocol, monkeypatch):
    """200 steps of four texts; a third of all answers of two servers are wrong in some way. Every
    text gets the right answer."""
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE", 0.05)
    chance = random.Random(protocol)
    faults = [*PASSING, "400", 0.01, 0.3]

    def fault(number):
        return chance.choice(faults) if chance.random() < 0.3 else None

    with (
        TeacherServer(THINK, protocol, faults=fault) as first,
        TeacherServer(THINK, protocol, flat=False, faults=fault) as second,
        Asking(first, second, timeout=0.2, concurrent=4) as asking,
    ):
        number = failed = 0
        for _ in range(200):
            numbers = range(number, number + 4)
            number += 4
            for one in numbers:
                asking.pool.ask(one, text(one))
            for one in numbers:
                asking.pool.need(one)
            for one, answer in asking.results(4).items():
                if isinstance(answer, str):  # four wrong answers in a row, or both refused it
                    failed += 1
                    continue
                assert_right(answer, text(one))
        assert failed < 40
        assert len(first.asked) + len(second.asked) > 1000
