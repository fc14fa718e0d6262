"""The process that asks, and what the training process gets of it."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_moe_inject.teachers.served.address import parse_addresses
from megatron_moe_inject.teachers.served.answers import Answers, ServerFailure
from megatron_moe_inject.teachers.served.wire import Settings
from tests.harness.teacher_server import TeacherServer, random_thinker

VOCAB = 50
THINK = random_thinker(VOCAB)


def text(number):
    return np.random.default_rng(number).integers(0, VOCAB, 12).astype(np.int32)


@pytest.fixture
def remarks():
    return []


@pytest.fixture
def server():
    with TeacherServer(THINK) as running:
        yield running


@pytest.fixture
def answers(server, remarks):
    settings = Settings(
        tuple(parse_addresses(server.url, None)), "vllm", "tiny", 5, 5.0, 1.0, 4, "OWN_KEY"
    )
    os.environ["OWN_KEY"] = "secret"
    asking = Answers(settings, remarks.append)
    yield asking
    asking.close()
    del os.environ["OWN_KEY"]


def assert_right(answer, tokens):
    best = THINK(tokens.tolist())[:-1].argmax(-1)
    assert answer.ids[:, 0].tolist() == best.tolist()


def test_answers_by_text(answers, server):
    """Asked ahead or not, several times in a step and in a step that runs again."""
    answers.hint([text(1), text(2)])
    step = [text(2), text(3), text(2)]
    for answer, tokens in zip(answers.fetch(step), step, strict=True):
        assert_right(answer, tokens)
    assert (answers.counts.texts, answers.counts.missed) == (3, 2)
    again = answers.fetch(step)
    assert len(server.asked) == 3
    assert_right(again[1], text(3))
    assert_right(answers.fetch([text(1)])[0], text(1))
    assert answers.ready == 0
    assert {h.get("Authorization") for h in server.headers} == {"Bearer secret"}


def test_what_is_not_wanted_is_let_go(answers, server):
    answers.hint([text(1), text(2)])
    answers.forget([text(1)])
    answers.fetch([text(2)])
    time.sleep(0.3)
    assert answers.ready == 0


def test_a_failure_is_told_and_forgotten(answers, server):
    server.faults = lambda n: "500"
    with pytest.raises(ServerFailure, match="says HTTP 500"):
        answers.fetch([text(1)])
    server.faults = lambda n: None
    assert_right(answers.fetch([text(1)])[0], text(1))


def test_a_process_that_is_killed_is_started_again(answers, server, remarks):
    answers.fetch([text(1)])
    server.seconds = 0.3
    answers.hint([text(n) for n in range(2, 8)])
    os.kill(answers._process.pid, signal.SIGKILL)
    for number, answer in enumerate(answers.fetch([text(n) for n in range(2, 8)]), 2):
        assert_right(answer, text(number))
    assert remarks == [
        "the process that asks the servers ended (exit code -9); it is started again"
    ]


def test_it_has_no_torch_and_ends_with_its_rank(server):
    script = (
        "import sys, threading, megatron_moe_inject.teachers.served.process\n"
        "print([n for n in ('torch', 'megatron', 'transformers') if n in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr
    alone = subprocess.Popen(
        [sys.executable, "-m", "megatron_moe_inject.teachers.served.process"],
        stdin=subprocess.PIPE,
    )
    alone.stdin.close()
    assert alone.wait(30) == 0
