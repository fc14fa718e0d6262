"""Files of rollouts: what is whole, and what is said of what is not."""

import json

import numpy as np
import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.rollouts.file_format import (
    Damaged,
    Writer,
    parse_rollouts,
    read_rollouts,
    write_rollouts,
)

WRITER = Writer("ab" * 16, 40)
TEXTS = [
    {"prompt": [1, 2], "completion": [3, 4, 5], "mask": [1, 0, 1], "document": 7},
    {"prompt": [6], "completion": [7]},
]


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "a.jsonl"
    write_rollouts(target, WRITER, TEXTS, {"temperature": 1.0})
    return target


def test_what_is_written_is_read(path):
    found = read_rollouts(path)
    assert found.writer == WRITER
    assert found.settings == {"temperature": 1.0}
    first, second = found.rollouts
    assert first.prompt.tolist() == [1, 2]
    assert first.completion.tolist() == [3, 4, 5]
    assert first.mask.tolist() == [True, False, True]
    assert second.mask.tolist() == [True]
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_every_cut_is_half_a_file(path):
    content = path.read_bytes()
    for end in range(len(content)):
        with pytest.raises(Damaged):
            parse_rollouts(content[:end])


def test_every_changed_line_is_seen(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines) - 1):
        other = list(lines)
        other[number] = other[number].replace(b"[", b"[ ", 1)
        with pytest.raises(Damaged, match="another checksum"):
            parse_rollouts(b"".join(other))
    with pytest.raises(Damaged, match="another checksum or count"):
        parse_rollouts(b"".join([*lines[:2], *lines[3:]]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"prompt": [1], "completion": []}, "an empty prompt or completion in line 2"),
        ({"completion": [1]}, "no ids and no text as prompt in line 2"),
        ({"prompt": [1], "completion": [-1]}, "no ids and no text as completion"),
        ({"prompt": [1], "completion": [True]}, "no ids and no text as completion"),
        ({"prompt": [1], "completion": [60]}, "has id 60 in the completion in line 2"),
        ({"prompt": "a", "completion": [1]}, "a text as prompt in line 2, and this tokenizer"),
        ({"prompt": [1], "completion": [10**30]}, "has id 1000000000000000000000000000000"),
        ({"prompt": [1], "completion": [1], "mask": [2]}, "a mask in line 2 that is no 0 or 1"),
        ({"prompt": [1], "completion": [1], "mask": [1, 1]}, "a mask in line 2"),
        ({"prompt": [1], "completion": [1], "log_probs": [-1, -1]}, "log_probs in line 2 that are"),
        ({"prompt": [1], "completion": [1], "log_probs": ["a"]}, "log_probs in line 2 that are"),
    ],
)
def test_what_no_rollout_can_have_is_named(tmp_path, text, said):
    write_rollouts(tmp_path / "a.jsonl", WRITER, [text])
    with pytest.raises(Damaged, match=said):
        parse_rollouts((tmp_path / "a.jsonl").read_bytes(), vocab_size=60)


def test_half_a_character_is_no_text(tmp_path):
    write_rollouts(tmp_path / "a.jsonl", WRITER, [{"prompt": "a", "completion": "\ud800"}])
    with pytest.raises(Damaged, match=r"half a character .* in the completion in line 2"):
        parse_rollouts(
            (tmp_path / "a.jsonl").read_bytes(), 300, lambda text: list(text.encode("utf-8"))
        )


def test_text_goes_through_the_tokenizer(tmp_path):
    write_rollouts(tmp_path / "a.jsonl", WRITER, [{"prompt": "ab", "completion": "c"}])
    content = (tmp_path / "a.jsonl").read_bytes()
    (found,) = parse_rollouts(content, 256, lambda text: list(text.encode())).rollouts
    assert np.concatenate([found.prompt, found.completion]).tolist() == [97, 98, 99]


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (None, "does not say which checkpoint"),
        ({"injection": 3}, "names a checkpoint by"),
        ({"injection": "a", "iteration": -1}, "names a checkpoint by"),
        ({"name": "a"}, "does not say which checkpoint"),
    ],
)
def test_a_file_says_who_wrote_it(path, checkpoint, said):
    import hashlib

    lines = path.read_bytes().splitlines(keepends=True)
    head = json.loads(lines[0]) | {"checkpoint": checkpoint}
    body = (json.dumps(head) + "\n").encode() + b"".join(lines[1:-1])
    foot = {"rollouts": 2, "sha256": hashlib.sha256(body).hexdigest()}
    with pytest.raises(Damaged, match=said):
        parse_rollouts(body + json.dumps(foot).encode() + b"\n")


def test_other_files_are_no_rollouts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(RecipeError, match=r"a\.jsonl.* does not begin with a line with \"format\""):
        read_rollouts(tmp_path / "a.jsonl")


def test_a_file_tells_the_loss_of_its_tokens_by_who_wrote_them(tmp_path):
    told = [
        {"prompt": [1], "completion": [2, 3, 4], "mask": [1, 0, 1], "log_probs": [-1.0, -7.0, -2]},
        {"prompt": [1], "completion": [2], "log_probs": [-6.0]},
    ]
    write_rollouts(tmp_path / "a.jsonl", WRITER, told)
    assert read_rollouts(tmp_path / "a.jsonl").lm_loss == pytest.approx(3.0)
    write_rollouts(tmp_path / "b.jsonl", WRITER, [*told, {"prompt": [1], "completion": [2]}])
    assert read_rollouts(tmp_path / "b.jsonl").lm_loss is None
