"""What a run finds out about servers before anything is built."""

import pytest

from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.recipe.server import ServerSpec
from megatron_moe_inject.teachers.served.address import parse_addresses
from megatron_moe_inject.teachers.served.client import api_key
from megatron_moe_inject.teachers.served.probe import TEXT, probe
from tests.harness.teacher_server import TeacherServer, random_thinker

VOCAB = 50
THINK = random_thinker(VOCAB)


def tokenize(text):
    return [ord(c) % VOCAB for c in text]


def failure(problem, remedy):
    return fail("teachers.coder.source", "server:...", problem, remedy)


def probed(*servers, key=None, length=64, vocab_size=VOCAB, own=None, files=None, **spec):
    addresses = [address for s in servers for address in parse_addresses(s.url, None)]
    return probe(
        "coder", ServerSpec(**{"top": 5, "timeout": 5, **spec}), addresses, key,
        length=length, vocab_size=vocab_size, tokenize=own, failure=failure, own_files=files,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_what_a_good_server_is(protocol):
    with TeacherServer(THINK, protocol, tokenize=tokenize) as server:
        found = probed(server, own=tokenize)
        assert probed(server, own=tokenize, protocol=protocol).settings == found.settings
    assert (found.settings.protocol, found.settings.model) == (protocol, "tiny")
    assert len(found.settings.probe) == len(found.settings.probe_log_probs) + 1
    assert VOCAB - 1 in found.settings.probe
    kind = {"vllm": "vLLM 0.33.0", "sglang": "SGLang"}[protocol]
    told = f"teacher coder: tiny (/models/tiny) at {server.url}, {kind}; the same {len(TEXT)} ids"
    told += " of a text as the student's tokenizer; 5 ids of each token; one text of 64 tokens took"
    if protocol == "sglang":  # says no other name of its model than this
        assert "SGLang; the same" in found.told
    else:
        assert found.told.startswith(told)
    assert max(map(len, server.asked)) == 64


@pytest.mark.parametrize(
    ("server", "spec", "says"),
    [
        (
            dict(max_logprobs=4),
            {},
            "refuses it (HTTP 400: Requested prompt logprobs of 5, which is greater than max "
            "allowed: 4); start it with a larger --max-logprobs, or set teachers.coder.server.top "
            "to less than 5",
        ),
        (
            {},
            dict(model="tinny"),
            "has no model 'tinny'; did you mean tiny? teachers.coder.server.model: tiny",
        ),
        (dict(max_model_len=64), {}, "takes 64 tokens, and 65 are needed (a sample, its last"),
        (dict(key="right"), {}, "refuses the key, or wants one (HTTP 401: Unauthorized: no key);"),
        (dict(protocol="other"), {}, "says neither that it is vLLM nor that it is SGLang"),
        (dict(tokenize=lambda text: [1, 2, 3]), {}, "has another tokenizer: of a text of"),
        (dict(think=random_thinker(40)), {}, "is out of vocabulary); use a teacher with the stud"),
        (dict(faults=lambda n: "garbage"), {}, "answered 24 bytes that are no JSON; start it, or"),
        (dict(faults=lambda n: "few"), {}, "has 4 ids at a place, where 5 were asked for; start "),
        (dict(faults=lambda n: 1.0), dict(timeout=0.3), "gave no answer within 0.3 s; start it"),
    ],
)
def test_a_server_that_does_not_fit(server, spec, says):
    options = {"think": THINK, "tokenize": tokenize, **server}
    with TeacherServer(**options) as running, pytest.raises(RecipeError) as error:
        probed(running, own=tokenize, **spec)
    assert str(error.value).startswith(f"teachers.coder.source: 'server:...' {running.url} ")
    assert says in str(error.value)


def test_a_server_that_is_not_there():
    with TeacherServer(THINK) as server:
        server.stop()
        with pytest.raises(RecipeError, match=r"cannot be spoken to \(ConnectionRefusedError"):
            probed(server)
        server.start()


def test_servers_with_different_models():
    with TeacherServer(THINK) as first:
        other = TeacherServer(random_thinker(VOCAB, 3))
        with other, pytest.raises(RecipeError, match="names servers with different models: log-p"):
            probed(first, other)
        other = TeacherServer(THINK, "sglang")
        with other, pytest.raises(RecipeError, match="names servers of vllm with tiny"):
            probed(first, other)


def test_a_student_without_text_and_a_server_without_tokenizer():
    with TeacherServer(THINK, tokenize=tokenize) as server:
        assert "tokens not compared: the student's tokenizer has no text" in probed(server).told
    with TeacherServer(THINK) as server:
        told = probed(server, own=tokenize).told
        assert "tokens not compared: the server has no /tokenize" in told


def test_a_beginning_that_only_the_students_tokenizer_adds():
    with TeacherServer(THINK, tokenize=tokenize) as server:
        told = probed(server, own=lambda text: [0, *tokenize(text)]).told
    assert "as the student's tokenizer" in told


def test_a_key_comes_by_the_environment(monkeypatch):
    monkeypatch.setenv("OWN_KEY", "secret\n")
    assert api_key("OWN_KEY", "k") == "secret"
    for value in (None, "", "two\nlines"):
        if value is None:
            monkeypatch.delenv("OWN_KEY")
        else:
            monkeypatch.setenv("OWN_KEY", value)
        with pytest.raises(RecipeError, match="k: 'OWN_KEY' is no environment variable with a key"):
            api_key("OWN_KEY", "k")


@pytest.mark.parametrize(("protocol", "longest"), [("vllm", 47), ("sglang", 48)])
def test_a_teacher_with_a_tokenizer_of_its_own(protocol, longest):
    """It is asked for no ids but the text's, and how long a text may be is not an error."""
    with TeacherServer(THINK, protocol, tokenize=tokenize, max_model_len=48) as server:
        found = probed(server, own=tokenize, files="/models/t", top=0)
        assert max(map(len, server.asked)) == longest
    assert found.longest == longest
    assert found.settings.top == 0
    assert "ids of a text as the tokenizer in /models/t; the log-probability of each" in found.told
    other = TeacherServer(THINK, protocol, tokenize=lambda text: [1, 2, 3])
    with other, pytest.raises(RecipeError) as error:
        probed(other, own=tokenize, files="/models/t", top=0)
    assert f"and the tokenizer in /models/t {len(TEXT)}, first other at 0" in str(error.value)
    remedy = "name the tokenizer of the served model: teachers.coder.server.tokenizer"
    assert str(error.value).endswith(remedy)
    small = TeacherServer(random_thinker(40), protocol, tokenize=tokenize)
    with small, pytest.raises(RecipeError, match=remedy):
        probed(small, own=tokenize, files="/models/t", top=0)
    with TeacherServer(THINK, protocol, max_model_len=None) as server:
        found = probed(server, own=tokenize, files="/models/t", top=0)
    assert found.longest is None
    assert "tokens not compared: the server has no /tokenize" in found.told
