"""Pairs in JSON lines as a data set: texts, ids, chat messages, and what is wrong with a line."""

import json

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_moe_inject.cli import main

WORDS = ["<s>", "</s>", "<u>", "<a>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }} "
    "{% if m.role != 'user' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a> {% endif %}"
)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of one that puts <s> in front, without and with a chat template."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="h"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    folders = []
    for template in (None, TEMPLATE):
        folder = tmp_path_factory.mktemp("tokenizer")
        made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
        made.chat_template = template
        made.save_pretrained(str(folder))
        folders.append(folder)
    return folders


@pytest.fixture
def prepare(tmp_path, tokenizers, capsys):
    """Runs the command on some lines; the pairs' parts, or what it said."""

    def run(lines, *options, chat=False):
        path, prefix = tmp_path / "pairs.jsonl", tmp_path / "out" / "pairs"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        status = main(
            [
                *("prepare-pairs", "--input", str(path), "--tokenizer", str(tokenizers[chat])),
                *("--output", str(prefix), *options),
            ]
        )
        said = capsys.readouterr()
        if status:
            assert not list(prefix.parent.glob("*")) if prefix.parent.exists() else True
            return said.err.strip()
        files = IndexedDataset(str(prefix))
        sequences = [files.get(i).tolist() for i in range(len(files.sequence_lengths))]
        record = json.loads(prefix.with_suffix(".json").read_text())
        return [sequences[i : i + 3] for i in range(0, len(sequences), 3)], record, said.out

    return run


def pair(prompt="a b", chosen="c d", rejected="e"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_texts(prepare):
    """The prompt begins and answers end as documents do; alike and long ones are left out."""
    lines = [pair(), pair(chosen="c", rejected="c"), pair(chosen="c d e f g"), pair("c")]
    pairs, record, said = prepare(lines, "--max-length", "7")
    assert pairs == [
        [ids("<s> a b"), ids("c d </s>"), ids("e </s>")],
        [ids("<s> c"), ids("c d </s>"), ids("e </s>")],
    ]
    assert {key: record[key] for key in ("pairs", "tokens", "longest", "alike", "too_long")} == {
        "pairs": 2, "tokens": 15, "longest": 6, "alike": 1, "too_long": 1,
    }  # fmt: skip
    assert "2 pairs, 15 tokens; the longest takes --seq-length 6" in said


def test_texts_without_what_is_put_around_them(prepare):
    pairs, _, _ = prepare([pair()], "--no-special-tokens", "--no-append-eod")
    assert pairs == [[ids("a b"), ids("c d"), ids("e")]]


def test_ids_stay_as_they_are(prepare):
    pairs, _, _ = prepare([pair([4, 5], [6], [7, 1])])
    assert pairs == [[[4, 5], [6], [7, 1]]]


def test_other_keys(prepare):
    line = {"question": "a", "good": "b", "bad": "c"}
    pairs, _, _ = prepare([line], "--fields", "question", "good", "bad")
    assert pairs == [[ids("<s> a"), ids("b </s>"), ids("c </s>")]]


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("with_prompt", [True, False])
def test_chat_messages(prepare, with_prompt):
    """By the tokenizer's template, with a prompt or with whole conversations."""
    asked = [message("user", "a b")]
    answers = [[message("assistant", text)] for text in ("c d", "e")]
    if with_prompt:
        line = pair(asked, *answers)
    else:
        line = {"chosen": asked + answers[0], "rejected": asked + answers[1]}
    pairs, _, _ = prepare([line], chat=True)
    assert pairs == [[ids("<u> a b <a>"), ids("c d </s>"), ids("e </s>")]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2 has no 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "line 2 has no 'prompt'"),
        (pair(prompt=""), "line 2 has no 'prompt'"),
        (pair(chosen=""), None),
        (pair(chosen=7), "has 7 under 'chosen'"),
        (pair(chosen=[5]), "is of ids and text"),
        (pair([4], [4], []), "has no token under 'rejected'"),
        (pair([4], [-3], [4]), "has id -3 under 'chosen'"),
        (pair([message("user", "a")], [message("assistant", "b")], []), "is of ids and messages"),
        (
            pair(*([message("user", text)] for text in "abc")),
            "the tokenizer has no chat template",
        ),
        ([1], "no object"),
        (pair(prompt="a \ud800"), "half a character"),
        (
            pair([4], [70_000], [4]),
            "has id 70000 under 'chosen', and the tokenizer",
        ),
        (pair([4], [4], [10**30]), "has id 1000000000000000000000000000000 under 'rejected'"),
    ],
)
def test_mistakes_of_a_line(prepare, line, says):
    said = prepare([pair(), line])
    if says is None:  # an empty answer ends at once
        assert said[0][1] == [ids("<s> a b"), ids("</s>"), ids("e </s>")]
        return
    assert said.startswith("moe-inject: --input: ")
    assert says in said


def test_a_prompt_that_its_answer_changes(prepare):
    """By the template; here the answer is said to be the user's, which ends otherwise."""
    asked = [message("user", "a")]
    line = pair(asked, [message("user", "b")], [message("user", "c")])
    assert "becomes another prompt with an answer" in prepare([line], chat=True)


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        ([], (), "no pair is in these files"),
        ([pair(chosen="e")], (), "all of the 1 pairs were left out"),
        ([pair()], ("--max-length", "1"), "--max-length"),
        ([pair()], ("--no-append-eod", "--eod-token", "<s>"), "--eod-token"),
    ],
)
def test_other_mistakes(prepare, lines, options, says):
    assert says in prepare(lines, *options)
