"""What a recipe may not ask of a server."""

import re
from argparse import Namespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.served.part import check_reading, in_the_clear, work_of_step
from megatron_moe_inject.teachers.served.rules import addresses_of, check_temperature

RECIPE = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {1: [0]}}}
  - {name: prose, data: [2], teacher: TEACHER, experts: {layers: {1: [1]}}}
teachers:
  coder: {source: "SOURCE"MORE}
  other: {source: "hf:/o"}
objective: {OBJECTIVE}
"""
HERE = "server:http://localhost:8000"


def recipe(more="", source=HERE, teacher="other", objective="alpha: 0.5"):
    text = RECIPE.replace("MORE", more).replace("TEACHER", teacher).replace("SOURCE", source)
    return recipe_from_yaml(text.replace("OBJECTIVE", objective))


def test_a_recipe_with_servers():
    found = recipe(
        ", tail: renormalize, temperature: 2.0, server: {protocol: vllm, model: m, top: 20, "
        "timeout: 60, patience: 600, ahead: 4, concurrent: 16, key_from: TEACHER_KEY}",
        source="server:http://a:8000/v1, https://b/llm/,http://[::1]:80",
    )
    assert [str(address) for address in addresses_of(found, "coder")] == [
        "http://a:8000", "https://b:443/llm", "http://[::1]:80",
    ]  # fmt: skip
    (told,) = in_the_clear(found, "coder")
    assert told == ("teacher coder: its key goes to http://a:8000 without encryption; use https://")
    args = Namespace(global_batch_size=16, seq_length=512)
    assert work_of_step(found, "coder", args) == (
        "teacher coder: at most 16 requests a step (a text is a sample, 8,192 tokens in all), "
        "answers of 1.3 MiB in memory, as JSON about 9 times that; 4 steps ahead"
    )
    check_temperature(found, "coder", 50_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(source="server:ftp://a"), "is no URL with http:// or https:// and a host; write suc"),
        (dict(source="server:a:8000"), "is no URL with http:// or https:// and a host"),
        (dict(source="server:http://a:x"), "is no URL (Port could not be cast"),
        (dict(source="server:http://a?key=1"), "has a query or a fragment behind a URL"),
        (dict(source="server:http://a,http://a:80"), "names http://a:80 twice"),
        (dict(more=", server: {top: 0}"), "teachers.coder.server.top: 0 is not positive"),
        (dict(more=", server: {ahead: -1}"), "teachers.coder.server.ahead: -1 is negative"),
        (dict(more=", server: {patience: 0}"), "teachers.coder.server.patience: 0.0 is no time"),
        (dict(more=", server: {protocol: tgi}"), "teachers.coder.server.protocol: 'tgi' is not kn"),
        (dict(more=", window: 2"), "window: 2 is of a model, and a server runs none"),
        (dict(more=", trusted: [a]"), "teachers.coder.trusted: ['a'] is for a store"),
        (dict(more=", tail: sample"), "teachers.coder.tail: 'sample' is of ids that were drawn"),
        (
            dict(more=", align: chunks"),
            "teachers.coder.server.tokenizer: None is missing: align: ch",
        ),
        (
            dict(more=", server: {tokenizer: /t}"),
            "'/t' is of a teacher with a tokenizer of its own",
        ),
        (
            dict(more=", align: chunks, server: {tokenizer: /t, top: 20}"),
            "teachers.coder.server.top: 20 is of the most likely ids, and align: chunks asks for",
        ),
        (
            dict(more=", align: chunks, tail: renormalize, server: {tokenizer: /t}"),
            "teachers.coder.tail: 'renormalize' is of ids that are not told",
        ),
        (dict(objective="confidence: entropy"), "needs a teacher's whole vocabulary, and teache"),
        (
            dict(source="hf:/x", more=", server: {top: 3}"),
            "is for a server; write such as source: server:http://host:8000, or remove it",
        ),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(source="server:http://user:hunter2@a"),
        dict(more=", server: {key_from: 'hunter2 is my key'}"),
    ],
)
def test_a_secret_where_none_belongs_is_not_shown(changes):
    with pytest.raises(RecipeError, match=r"\(not shown\)") as error:
        recipe(**changes)
    assert "hunter2" not in str(error.value)


def test_temperatures_that_cannot_be_had():
    hot = recipe(", temperature: 2.0, server: {top: 20}")
    with pytest.raises(RecipeError, match=r"2\.0 cannot be had from 20 ids at temper"):
        check_temperature(hot, "coder", 21)
    check_temperature(hot, "coder", 20)
    check_temperature(recipe(", server: {top: 20}"), "coder", 21)
    several = recipe()
    several.domains[1].teacher = "coder"
    several.domains[0].temperature = 3.0
    with pytest.raises(RecipeError, match=r"\[1.0, 3.0\] are several, and servers are asked at on"):
        check_temperature(several, "coder", 21)


def test_windows_that_are_to_be_read_apart():
    args = Namespace(reset_position_ids=False, reset_attention_mask=True)
    with pytest.raises(RecipeError, match="--reset-attention-mask: documents of a window are to"):
        check_reading(recipe(), args)
    args.dataloader_inter_document_masking = True
    check_reading(recipe(), args)


def test_a_teacher_with_a_tokenizer_of_its_own():
    """Any temperature, a prefix, and documents that are masked from each other."""
    found = recipe(
        ", align: chunks, temperature: 7.0, prefix: bos, server: {tokenizer: /t, protocol: sglang}"
    )
    check_temperature(found, "coder", 50_000)
    args = Namespace(global_batch_size=16, seq_length=512, reset_attention_mask=True)
    check_reading(found, args)
    assert work_of_step(found, "coder", args) == (
        "teacher coder: each document of a sample is a text, of 8,192 of the student's tokens a "
        "step as the teacher's own, of each of which 8 bytes in memory, as JSON about 34; 2 steps "
        "ahead"
    )
    args.reset_attention_mask = False
    assert "coder: at most 16 texts, of 8,192 of the" in work_of_step(found, "coder", args)
