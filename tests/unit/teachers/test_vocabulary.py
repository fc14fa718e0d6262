"""Vocabularies of student and teacher: read as data, compared by token or at least by size."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers.base import Source, padded_rows
from megatron_moe_inject.teachers.fit import excluded_ids
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.tokenizer_files import (
    UnreadableTokenizer,
    read_added_tokens,
    read_token_ids,
)
from megatron_moe_inject.teachers.vocabulary import (
    TokenizerFlags,
    Vocabulary,
    check_vocabulary,
    within_rows,
)

TOKENS = {"a": 0, "b": 1, "ab": 2, "<eod>": 3}


def source(path) -> Source:
    return Source("coder", f"hf:{path}", "hf", Path(path))


def write_tokenizer(folder: Path, vocab: dict[str, int], added: dict[str, int] | None = None):
    folder.mkdir(exist_ok=True)
    content = {
        "added_tokens": [{"id": i, "content": t} for t, i in (added or {}).items()],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def flags(folder: Path, **more) -> TokenizerFlags:
    return TokenizerFlags("HuggingFaceTokenizer", model=str(folder), **more)


def test_tokenizer_json_with_added_tokens(tmp_path):
    folder = write_tokenizer(tmp_path / "t", {"a": 0, "b": 1, "ab": 2}, {"<eod>": 3})
    assert read_token_ids(folder) == TOKENS
    assert read_token_ids(folder / "tokenizer.json") == TOKENS


def test_tokenizer_json_of_the_tokenizers_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["<eod>"])
    trained.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    assert read_token_ids(tmp_path) == trained.get_vocab(with_added_tokens=True)
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("x", -1.0), ("y", -2.0)], 0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert read_token_ids(tmp_path) == {"x": 0, "y": 1}


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=15,
        minloglevel=2,
    )
    ids = read_token_ids(tmp_path / "tokenizer.model")
    assert ids["<unk>"] == 0
    assert len(ids) == 15
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01nonsense")
    with pytest.raises(UnreadableTokenizer, match="is damaged"):
        read_token_ids(tmp_path / "tokenizer.model")


def test_gpt2_and_wordpiece_files(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<eod>": 2}))
    assert read_token_ids(tmp_path) == {"a": 0, "b": 1, "<eod>": 2}
    (tmp_path / "vocab.txt").write_text("[PAD]\nword\n##s\n")
    assert read_token_ids(tmp_path / "vocab.txt") == {"[PAD]": 0, "word": 1, "##s": 2}


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": "b"}', '{"model": {"vocab": 3}}', "{}"])
def test_damaged_files_are_unreadable(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnreadableTokenizer):
        read_token_ids(tmp_path)


def test_a_folder_without_tokenizer_is_unreadable(tmp_path):
    with pytest.raises(UnreadableTokenizer, match=r"holds no tokenizer\.json"):
        read_token_ids(tmp_path)
    with pytest.raises(UnreadableTokenizer, match="is not there"):
        read_token_ids(tmp_path / "nowhere")


def test_flags_of_megatron(tmp_path):
    folder = write_tokenizer(tmp_path / "t", TOKENS)
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        vocab_file=None,
        special_tokens=["<x>", "a"],
        vocab_size=None,
        padded_vocab_size=256,
        make_vocab_size_divisible_by=512,
        tensor_model_parallel_size=4,
    )
    vocabulary = TokenizerFlags.from_args(args).vocabulary()
    assert vocabulary.ids == TOKENS | {"<x>": 4}
    assert (vocabulary.size, vocabulary.rows, vocabulary.padding) == (5, 256, 2048)
    assert TokenizerFlags.from_args(Namespace()).vocabulary().sizes() is None


def test_tokenizer_saved_with_the_model_stands_in(tmp_path):
    folder = write_tokenizer(tmp_path / "saved", TOKENS)
    gone = flags(tmp_path / "elsewhere")
    assert gone.vocabulary().ids is None
    assert gone.vocabulary(folder).ids == TOKENS


def test_gpt2_flags_read_the_vocab_file(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps(TOKENS))
    found = TokenizerFlags("GPT2BPETokenizer", vocab_file=str(tmp_path / "v.json")).vocabulary()
    assert found.ids == TOKENS


def test_equal_tokens_pass_whatever_the_padding(tmp_path):
    student = flags(write_tokenizer(tmp_path / "s", TOKENS), padded_vocab_size=8).vocabulary()
    teacher = flags(write_tokenizer(tmp_path / "t", TOKENS), padded_vocab_size=4096).vocabulary()
    assert "the same 4 tokens" in check_vocabulary(student, teacher, source(tmp_path)).told


def test_differing_tokens_are_named(tmp_path):
    student = flags(write_tokenizer(tmp_path / "s", TOKENS)).vocabulary()
    swapped = TOKENS | {"ab": 3, "<eod>": 2, "new": 4}
    teacher = flags(write_tokenizer(tmp_path / "t", swapped)).vocabulary()
    with pytest.raises(RecipeError) as caught:
        check_vocabulary(student, teacher, source(tmp_path))
    message = str(caught.value)
    assert message.startswith("teachers.coder.source: 'hf:")
    assert "3 ids differ" in message
    assert "id 2 is 'ab' for the student and '<eod>' for the teacher" in message
    assert "id 4 is nothing for the student and 'new' for the teacher" in message


def test_teacher_rows_must_cover_the_students_ids(tmp_path):
    student = flags(write_tokenizer(tmp_path / "s", TOKENS)).vocabulary()
    with pytest.raises(RecipeError, match="has 3 embedding rows for the student's 4 ids"):
        check_vocabulary(student, replace(student, rows=3), source(tmp_path))


UNREAD = Vocabulary("Tik", unreadable="vocabularies of Tik cannot be read")


@pytest.mark.parametrize(
    ("student", "teacher", "same"),
    [
        ({"size": 50257}, {"size": 50257, "rows": 50304}, True),
        ({"size": 50257}, {"size": 50256, "rows": 50304}, False),
        ({"size": 50257}, {"rows": 50304}, True),
        ({"size": 50257}, {"rows": 50256}, False),
        ({"size": 32000}, {"rows": 152064}, False),
        ({"size": 32000}, {"rows": 32000 + 1023}, True),
        ({"size": 32000}, {"rows": 32000 + 1024}, False),
        ({"size": 32000}, {"rows": 32000 + 4095, "padding": 4096}, True),
        ({"rows": 32768}, {"size": 32000, "rows": 32000}, True),
        ({"rows": 32768}, {"rows": 32000}, True),
        ({"rows": 32768}, {"rows": 50304}, False),
    ],
)
def test_sizes_agree_up_to_padding(student, teacher, same):
    student, teacher = replace(UNREAD, **student), replace(UNREAD, **teacher)
    if same:
        told = check_vocabulary(student, teacher, source("/t")).told
        assert told.startswith("sizes agree")
        assert told.endswith("tokens not compared: vocabularies of Tik cannot be read")
    else:
        with pytest.raises(RecipeError, match="has another vocabulary"):
            check_vocabulary(student, teacher, source("/t"))


def test_without_any_size_nothing_is_compared_and_told_so():
    told = check_vocabulary(UNREAD, replace(UNREAD, rows=8), source("/t")).told
    assert told == "not compared: vocabularies of Tik cannot be read"


@pytest.mark.parametrize("text", ["", "coder", "disk:/tmp", "megatron:", "hf: ", "/tmp"])
def test_other_sources_are_refused(text):
    with pytest.raises(RecipeError, match="write megatron:/dir or hf:/dir"):
        parse_source("coder", text)


def test_head_rows_are_views_inside_and_zero_beyond_the_vocabulary():
    import torch

    head = torch.arange(12.0).view(6, 2) + 1
    inside = padded_rows(head, 4, 1, 4)
    assert inside.data_ptr() == head[1:].data_ptr()
    across = padded_rows(head, 4, 3, 9)
    assert torch.equal(across[0], head[3])
    assert across.shape == (6, 2)
    assert not across[1:].any()
    assert not padded_rows(head, 4, 5, 8).any()


def test_more_tokens_of_the_teacher_take_no_part(tmp_path):
    """As every instruct model has them: behind the student's, or where the student has no token."""
    student = flags(write_tokenizer(tmp_path / "s", TOKENS, {"<z>": 6})).vocabulary()
    more = {"<z>": 6, "<chat>": 4, "<pad>": 7, "<end>": 8, "<x>": 9}
    teacher = flags(write_tokenizer(tmp_path / "t", TOKENS, more)).vocabulary()
    found = check_vocabulary(student, replace(teacher, rows=16), source(tmp_path))
    assert found.by_token
    assert not found.unknown
    assert found.dropped == {i: token for token, i in more.items() if token != "<z>"}
    assert found.told == (
        "the same 5 tokens as the student's; 4 tokens (4 '<chat>', 7 '<pad>', 8 '<end>', ...) that "
        "the student lacks take no part"
    )
    info = SimpleNamespace(shared=found)
    assert excluded_ids(info) == {4}


def test_added_tokens_that_the_teacher_lacks_are_named(tmp_path):
    added = {"<tool>": 4, "<image>": 5}
    student = flags(write_tokenizer(tmp_path / "s", TOKENS, added), special_tokens=("<x>",))
    teacher = flags(write_tokenizer(tmp_path / "t", TOKENS, {"<tool>": 4})).vocabulary()
    found = check_vocabulary(student.vocabulary(), replace(teacher, rows=5), source(tmp_path))
    assert found.unknown == {5: "<image>", 6: "<x>"}
    assert "it lacks 2 tokens (5 '<image>', 6 '<x>') of the student's" in found.told
    assert excluded_ids(SimpleNamespace(shared=found)) == {5, 6}


def test_ordinary_tokens_that_the_teacher_lacks_are_refused(tmp_path):
    """Without them the same text is cut in other ways."""
    student = flags(write_tokenizer(tmp_path / "s", TOKENS | {"ba": 4})).vocabulary()
    teacher = flags(write_tokenizer(tmp_path / "t", TOKENS)).vocabulary()
    with pytest.raises(RecipeError, match="lacks 1 ordinary tokens of the student's: id 4 is 'ba'"):
        check_vocabulary(student, teacher, source(tmp_path))


@pytest.mark.parametrize(
    "added",
    [
        pytest.param({"<eod2>": 3}, id="another token of the same id"),
        pytest.param({"<eod>": 5}, id="the same token of another id"),
    ],
)
def test_an_id_must_stand_for_one_text(tmp_path, added):
    base = {token: i for token, i in TOKENS.items() if i < 3}
    student = flags(write_tokenizer(tmp_path / "s", base, {"<eod>": 3})).vocabulary()
    teacher = flags(write_tokenizer(tmp_path / "t", base, added)).vocabulary()
    with pytest.raises(RecipeError, match=r"has another tokenizer, \d ids differ: id 3 is '<eod>'"):
        check_vocabulary(student, teacher, source(tmp_path))


def test_added_tokens_without_a_row_are_left_out(tmp_path):
    """Published Gemma 3 text models: 262,144 rows, and id 262,144 in the tokenizer."""
    own = flags(write_tokenizer(tmp_path / "t", TOKENS, {"<image>": 4})).vocabulary()
    within = within_rows(replace(own, rows=4), source(tmp_path), "restore it")
    assert (within.ids, within.size) == (TOKENS, 4)
    with pytest.raises(RecipeError, match="has 3 embedding rows for a tokenizer with 5 ids; rest"):
        within_rows(replace(own, rows=3), source(tmp_path), "restore it")
    assert check_vocabulary(own, within, source(tmp_path)).unknown == {4: "<image>"}


def test_added_tokens_of_every_kind_of_file(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), vocab_size=15, minloglevel=2,
        model_prefix=str(tmp_path / "tokenizer"),
    )  # fmt: skip
    assert read_added_tokens(tmp_path / "tokenizer.model") == {"<unk>", "<s>", "</s>"}
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    (gpt2 / "added_tokens.json").write_text(json.dumps({"<eod>": 2}))
    (gpt2 / "special_tokens_map.json").write_text(
        json.dumps(
            {"eos_token": {"content": "<|endoftext|>"}, "additional_special_tokens": ["<y>"]}
        )
    )
    assert read_added_tokens(gpt2) == {"<eod>", "<|endoftext|>"}
