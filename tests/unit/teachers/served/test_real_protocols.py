"""vLLM's and SGLang's own code against what we send and read, where they are installed."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_inject.teachers.served.protocols import PROTOCOLS
from tests.harness.served_folders import vllm_python
from tests.harness.teacher_server import random_thinker

HARNESS = Path(__file__).parents[3] / "harness"
THINK = random_thinker(40)
TOP = 6


def texts():
    """One of which some ids are what the model finds most likely, and one at random."""
    tokens = np.array([3, 7, 1, 39, 0, 5], np.int32)
    tokens[3] = THINK(tokens[:3].tolist())[-1].argmax()
    return [tokens, np.arange(39, 0, -5, dtype=np.int32)]


def told(script, given):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [vllm_python(), str(HARNESS / script)], input=json.dumps(given), env=environment,
        text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_right(answer, tokens, top=TOP):
    log_probs = THINK(tokens.tolist())[:-1]
    used = answer.ids >= 0
    rows = np.arange(len(log_probs))[:, None]
    expected = np.where(used, log_probs[rows, np.maximum(answer.ids, 0)], -np.inf)
    assert np.array_equal(expected, answer.log_probs)
    best = np.argsort(-log_probs, 1)[:, :top]
    for own, most_likely, token in zip(answer.ids, best, tokens[1:], strict=True):
        assert set(own[own >= 0]) == {*most_likely.tolist(), int(token)}


@pytest.mark.parametrize("top", [TOP, 0])
def test_vllm(top):
    """Also where the text's own ids alone are asked for."""
    protocol = PROTOCOLS["vllm"]
    cases = [
        {"request": protocol.request(t, top, "m"), "log_probs": THINK(t.tolist()).tolist()}
        for t in texts()
    ]
    for tokens, answer in zip(texts(), told("vllm_answers.py", cases), strict=True):
        assert answer["sampling"] == {
            "temperature": 0.0, "prompt_logprobs": top, "max_tokens": 1,
            "truncate_prompt_tokens": None,
        }  # fmt: skip
        assert_right(protocol.answer(answer["answer"], tokens, top), tokens, top)


def test_sglang():
    source = os.environ.get("SGLANG_SOURCE")
    if not source:
        pytest.skip("SGLANG_SOURCE names no folder with SGLang's wheel unpacked")
    protocol, cases = PROTOCOLS["sglang"], []
    for tokens in texts():
        log_probs = THINK(tokens.tolist())[:-1]
        ids = np.argsort(-log_probs, 1)[:, :TOP]
        values = np.take_along_axis(log_probs, ids, 1).tolist()
        case = {"request": protocol.request(tokens, TOP, "m"), "top": TOP}
        cases.append({**case, "values": [None, *values], "ids": [None, *ids.tolist()]})
    found = told("sglang_answers.py", {"source": source, "cases": cases})
    for tokens, answer in zip(texts(), found, strict=True):
        assert answer["problem"] is None
        log_probs = THINK(tokens.tolist())
        own = [[float(log_probs[n, t]), int(t), None] for n, t in enumerate(tokens[1:])]
        content = {"input_token_logprobs": [[None, int(tokens[0]), None], *own]}
        answered = protocol.answer({"meta_info": content | answer["fields"]}, tokens, TOP)
        assert_right(answered, tokens)
