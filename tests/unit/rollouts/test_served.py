"""Rollouts from servers: against a real HTTP server that speaks as vLLM or SGLang."""

import numpy as np
import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.rollouts import identity, served
from megatron_moe_inject.rollouts.file_format import Writer, read_rollouts
from megatron_moe_inject.rollouts.settings import Asked, Sampling
from tests.harness.teacher_server import random_thinker
from tests.harness.writing_server import WritingServer

WRITER = Writer("ab" * 16, 40)
THINK = random_thinker(50)
PROMPTS = [[n + 1, 2 * n + 3, 7] for n in range(7)]


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch):
    monkeypatch.setattr(identity, "writer_of_folder", lambda folder, step=None: WRITER)
    monkeypatch.setattr(identity, "vocabulary_of", lambda folder, step=None: 50)
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": {prompt}}}\n' for prompt in PROMPTS))

    def made(**sampling):
        sampling = Sampling(**{"max_tokens": 6, "temperature": 0.0, "stop": (9,)} | sampling)
        return Asked(
            str(path),
            str(tmp_path / "own"),
            per_file=3,
            batch=2,
            sampling=sampling,
            checkpoint="save",
        )

    return made


def at(*servers, **more):
    return served.At(",".join(server.url for server in servers), **more)


def texts(folder):
    return [
        (rollout.prompt.tolist(), rollout.completion.tolist())
        for path in sorted(folder.iterdir())
        for rollout in read_rollouts(path).rollouts
    ]


def greedy(prompt, sampling):
    ids = list(prompt)
    while len(ids) - len(prompt) < sampling.max_tokens:
        ids.append(int(THINK(ids)[-1].argmax()))
        if ids[-1] in sampling.stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_what_a_server_writes_is_what_its_model_says(asked, protocol, monkeypatch):
    own = asked()
    monkeypatch.setenv("OUR_KEY", "secret")
    with WritingServer(THINK, protocol, key="secret") as server:
        told = served.write_at_servers(own, at(server, key_from="OUR_KEY"))
    assert "3 files written" in told
    assert "7 prompts, iteration 40" in told
    assert texts(own.folder) == [(p, greedy(p, own.sampling)) for p in PROMPTS]
    for path in own.folder.iterdir():
        found = read_rollouts(path)
        assert found.writer == WRITER
        assert found.settings["by"] == protocol
        for text in found.rollouts:
            whole = np.concatenate([text.prompt, text.completion])
            told = THINK(whole.tolist())[len(text.prompt) - 1 : -1]
            said = told[np.arange(len(text.completion)), text.completion]
            assert np.allclose(text.log_probs, said)


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_nothing_of_sampling_is_left_to_the_server(asked, protocol):
    own = asked(temperature=0.7, top_p=0.9, top_k=3)
    with WritingServer(THINK, protocol) as server:
        served.write_at_servers(own, at(server))
    for body in server.bodies:
        said = body if protocol == "vllm" else body["sampling_params"]
        wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0, "n": 1}
        wanted |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert wanted.items() <= said.items()


def test_a_completion_ends_where_the_servers_context_does(asked):
    own = asked(stop=())
    with WritingServer(THINK) as one, WritingServer(THINK, max_model_len=7) as two:
        served.write_at_servers(own, at(one, two))
    assert {len(completion) for _, completion in texts(own.folder)} == {4}


def test_two_servers_share_the_work_and_give_what_one_gives(asked, tmp_path):
    own = asked(temperature=1.0)
    with WritingServer(THINK) as one:
        served.write_at_servers(own, at(one))
    expected = texts(own.folder)
    assert len(set(one.seeds)) == len(PROMPTS)
    for path in own.folder.iterdir():
        path.unlink()
    with WritingServer(THINK) as one, WritingServer(THINK) as two:
        served.write_at_servers(own, at(one, two))
    assert texts(own.folder) == expected
    assert min(len(one.asked), len(two.asked)) >= 3


def test_a_server_that_fails_is_left_for_another(asked):
    own = asked()
    with WritingServer(THINK, faults=lambda n: "500") as bad, WritingServer(THINK) as good:
        served.write_at_servers(own, at(bad, good))
    assert [text for _, text in texts(own.folder)] == [greedy(p, own.sampling) for p in PROMPTS]


def test_an_interrupted_command_goes_on_behind_what_is_whole(asked):
    own = asked()
    again = pytest.raises(RecipeError, match="give the same command again")
    with WritingServer(THINK, faults=lambda n: "400" if n == 5 else None) as server, again:
        served.write_at_servers(own, at(server))
    before = {path.name: path.stat().st_mtime_ns for path in own.folder.iterdir()}
    assert 1 <= len(before) <= 2
    with WritingServer(THINK) as server:
        told = served.write_at_servers(own, at(server))
    assert f"{len(before)} were there" in told
    assert texts(own.folder) == [(p, greedy(p, own.sampling)) for p in PROMPTS]
    assert {name: (own.folder / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize(
    ("server", "more", "said"),
    [
        (dict(told=False), {}, "has no single choice with token_ids and logprobs"),
        (
            dict(max_model_len=3),
            {},
            "the prompt of document or line 0 has 3 tokens, which leaves none of the 3 of http",
        ),
        (dict(ids=False), {}, "token_ids and logprobs; use vLLM 0.10.2 or later"),
        (dict(faults=lambda n: "other_json"), {}, "has no single choice with token_ids"),
        (dict(faults=lambda n: "503"), {}, "says HTTP 503: as the test asks: 503; see to it"),
        (dict(key="secret"), {}, "refuses the key, or wants one"),
        (dict(), {"model": "other"}, "--model: 'other' is not at http"),
        (dict(), {"protocol": "sglang"}, "has no /generate for this model"),
        (dict(), {"timeout": 0}, "--timeout: 0 is no time"),
        (dict(), {"key_from": "NOT_SET"}, "--key-from: 'NOT_SET' is no environment variable"),
    ],
)
def test_what_does_not_work_is_named(asked, server, more, said):
    with WritingServer(THINK, **server) as one, pytest.raises(RecipeError) as caught:
        served.write_at_servers(asked(), at(one, **more))
    assert said in str(caught.value)


@pytest.mark.parametrize("rows", [20, None])
def test_a_server_with_more_words_than_the_student_is_another_model(asked, monkeypatch, rows):
    monkeypatch.setattr(identity, "vocabulary_of", lambda folder, step=None: rows)
    with WritingServer(THINK) as server:
        if rows is None:  # the checkpoint does not say
            served.write_at_servers(asked(), at(server))
            return
        with pytest.raises(RecipeError, match="has rows for ids below 20: it serves another model"):
            served.write_at_servers(asked(), at(server))


def test_servers_of_two_models_are_refused(asked):
    refused = pytest.raises(RecipeError, match="name servers of one model")
    with WritingServer(THINK) as one, WritingServer(THINK, model="other") as two, refused:
        served.write_at_servers(asked(), at(one, two))


def test_what_is_no_server_is_named(asked):
    with WritingServer(THINK) as gone:
        pass
    with pytest.raises(RecipeError, match="cannot be spoken to"):
        served.write_at_servers(asked(), at(gone))
    with pytest.raises(RecipeError, match="holds credentials") as caught:
        served.write_at_servers(asked(), served.At("http://me:secret@a"))
    assert "secret" not in str(caught.value)
