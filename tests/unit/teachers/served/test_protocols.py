"""What is read of answers of vLLM and SGLang, and what is not taken for one."""

import base64
import copy
import json
import math

import numpy as np
import pytest

from megatron_moe_inject.teachers.served.protocols import PROTOCOLS, BadAnswer

TOKENS = np.array([5, 3, 9], np.int32)
VLLM = {
    "choices": [
        {
            "prompt_token_ids": [5, 3, 9],
            "prompt_logprobs": [
                None,
                {
                    "3": {"logprob": -3.0, "rank": 9, "decoded_token": "x"},
                    "7": {"logprob": -0.5, "rank": 1, "decoded_token": "y"},
                    "0": {"logprob": -1.5, "rank": 2, "decoded_token": "z"},
                },
                {
                    "9": {"logprob": -0.25, "rank": 1, "decoded_token": "w"},
                    "4": {"logprob": -9999.0, "rank": 2, "decoded_token": "v"},
                },
            ],
        }
    ]
}
SGLANG = {
    "meta_info": {
        "input_token_logprobs": [[None, 5, None], [-3.0, 3, None], [-0.25, 9, None]],
        "input_top_logprobs": [
            None,
            [[-0.5, 7, None], [-1.5, 0, None]],
            [[-0.25, 9, None], [None, 4, None]],
        ],
    }
}


def flat(content):
    """The same in the form that newer servers send."""
    content = copy.deepcopy(content)
    told = content["meta_info"]
    rows = told.pop("input_top_logprobs")[1:]
    values = np.array([[-np.inf if e[0] is None else e[0] for e in row] for row in rows], "<f4")
    ids = np.array([[e[1] for e in row] for row in rows], "<i4")
    for name, array in (("val", values), ("idx", ids)):
        key = f"input_top_logprobs_{name}_flat_b64"
        told[key] = base64.b64encode(array.tobytes()).decode()
        told[f"{key}_dtype"] = {"val": "float32", "idx": "int32"}[name]
    told["input_top_logprobs_shape"] = list(ids.shape)
    told["input_top_logprobs_null_prefix"] = 1
    return content


FORMS = {
    "vllm": ("vllm", VLLM),
    "sglang": ("sglang", SGLANG),
    "sglang-flat": ("sglang", flat(SGLANG)),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_read(form):
    protocol, content = FORMS[form]
    ids, log_probs = PROTOCOLS[protocol].answer(json.loads(json.dumps(content)), TOKENS, 2)
    assert ids.tolist() == [[7, 0, 3], [9, -1, -1]]
    assert log_probs.tolist() == [[-0.5, -1.5, -3.0], [-0.25, -math.inf, -math.inf]]
    assert (ids.dtype, log_probs.dtype) == (np.int32, np.float32)


def at(*path, value=None, of="vllm"):
    """An answer in which one value is another, or left out if that is ``...``."""
    protocol, content = FORMS[of]
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return protocol, content


ROWS = ("choices", 0, "prompt_logprobs")
TOLD, TOP, OWN = "meta_info", "input_top_logprobs", "input_token_logprobs"
FLAT = "input_top_logprobs_idx_flat_b64"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("vllm", []), "has no single choice"),
        (("vllm", {"choices": []}), "has no single choice"),
        (at("choices", 0, "prompt_logprobs", value=...), "has no single choice with prompt_logp"),
        (at(*ROWS, value=[None, {}]), "has 2 places for 3 tokens"),
        (at(*ROWS, value=None), "has no places for 3 tokens"),
        (at("choices", 0, "prompt_token_ids", value=[5, 3, 8]), "is about other tokens than"),
        (at("choices", 0, "prompt_token_ids", value=[5, 3]), "is about 2 tokens, where 3 were se"),
        (at(*ROWS, 1, value=None), "has a place without an object of ids"),
        (at(*ROWS, 1, "7", value={"rank": 1}), "has an id without a logprob"),
        (at(*ROWS, 1, "7", "logprob", value="much"), "has a log-probability that is no number"),
        (at(*ROWS, 2, "4", value=...), "has 1 ids at a place, where 2 were asked for"),
        (at(*ROWS, 1, "8", value={"logprob": -4.0}), "has 4 ids at a place, where 2 were asked"),
        (at(*ROWS, 1, "3", value=...), "does not say how likely the text itself is"),
        (at(*ROWS, 1, "7", "logprob", value=2.0), "which are no log-probabilities at temperature"),
        (at(*ROWS, 2, "9", "logprob", value=-9999.0), "has probabilities of 0 to"),
        (
            at(*ROWS, 2, value={i: {"logprob": None} for i in ("9", "4")}),
            "has NaN for log-probabilities",
        ),
        (("sglang", {"text": "x"}), "has no meta_info with input_token_logprobs"),
        (at(TOLD, OWN, 1, 1, value=4, of="sglang"), "is about other tokens than were sent"),
        (at(TOLD, TOP, value=..., of="sglang"), "has no places for 3 tokens"),
        (at(TOLD, TOP, 1, 1, value=[-1.5], of="sglang"), "has an id without a log-probability"),
        (at(TOLD, TOP, 1, 1, 1, value=7, of="sglang"), "has an id twice at a place"),
        (at(TOLD, FLAT, value="no base64!", of="sglang-flat"), "do not fit together"),
        (at(TOLD, FLAT, value="AAAA", of="sglang-flat"), "do not fit together"),
        (
            at(TOLD, "input_top_logprobs_shape", value=[1, 4], of="sglang-flat"),
            "has 2 places for 3 tokens",
        ),
        (
            at(TOLD, "input_top_logprobs_shape", value=[4, 1], of="sglang-flat"),
            "has 5 places for 3 tokens",
        ),
        (at(TOLD, "input_top_logprobs_null_prefix", value=0, of="sglang-flat"), "begins at token"),
        (
            at(TOLD, f"{FLAT}_dtype", value="int64", of="sglang-flat"),
            "has numbers that are not int32",
        ),
    ],
)
def test_what_is_not_an_answer(changed, says):
    protocol, content = changed
    with pytest.raises(BadAnswer, match=says):
        PROTOCOLS[protocol].answer(json.loads(json.dumps(content)), TOKENS, 2)


def test_a_server_that_does_not_repeat_the_text_is_believed():
    """Older releases of vLLM; that the text's id is in each place is still seen."""
    content = at("choices", 0, "prompt_token_ids", value=...)[1]
    assert PROTOCOLS["vllm"].answer(content, TOKENS, 2).ids[0, 0] == 7


def test_requests_are_json_of_plain_values():
    for protocol in PROTOCOLS.values():
        request = json.loads(json.dumps(protocol.request(TOKENS, 4, "m")))
        assert TOKENS.tolist() in request.values()
        assert 4 in request.values()


def test_the_text_alone():
    """With none of the most likely ids each place has that of the text."""
    vllm = copy.deepcopy(VLLM)
    places = vllm["choices"][0]["prompt_logprobs"]
    places[1:] = [{"3": places[1]["3"]}, {"9": places[2]["9"]}]
    sglang = copy.deepcopy(SGLANG)
    del sglang["meta_info"]["input_top_logprobs"]
    for name, content in (("vllm", vllm), ("sglang", sglang)):
        protocol = PROTOCOLS[name]
        asked = protocol.request(TOKENS, 0, "tiny")
        assert 0 in (asked.get("prompt_logprobs"), asked.get("top_logprobs_num"))
        assert not [key for key in asked if "flat" in key]
        answer = protocol.answer(content, TOKENS, 0)
        assert answer.ids.tolist() == [[3], [9]]
        assert answer.log_probs.tolist() == [[-3.0], [-0.25]]
    for value in (None, 3.0):
        sglang["meta_info"]["input_token_logprobs"][1][0] = value
        with pytest.raises(BadAnswer, match=r"NaN for log-prob|which are no log-probabilities"):
            PROTOCOLS["sglang"].answer(sglang, TOKENS, 0)
    del places[1]["3"]
    with pytest.raises(BadAnswer, match="does not say how likely the text itself is"):
        PROTOCOLS["vllm"].answer(vllm, TOKENS, 0)
    with pytest.raises(BadAnswer, match="has 3 ids at a place, where 0 were asked for"):
        PROTOCOLS["vllm"].answer(VLLM, TOKENS, 0)
