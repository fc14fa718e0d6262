"""``moe-inject prepare-data``: Megatron reads what it writes, and reads back the text."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron_moe_inject import cli
from megatron_moe_inject.data import prepare as prepare_module
from megatron_moe_inject.data.document_ids import Encoder, Encoding, is_held_out, load_tokenizer
from megatron_moe_inject.data.json_lines import read_lines
from megatron_moe_inject.host.errors import RecipeError
from tests.harness.docs import ROOT

TOKENIZER = ROOT / "examples" / "quickstart" / "tokenizer"
END = 0
"""Of the quickstart's tokenizer."""
TEXTS = [f"def f{i}(x):\n    return x + {i}  # Größe µ\n" * (1 + i % 3) for i in range(60)]


def _write(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def _run(capsys, *arguments):
    status = cli.main(["prepare-data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def _prepare(tmp_path, capsys, texts=TEXTS, *options, name="set", tokenizer=TOKENIZER):
    source = _write(tmp_path / f"{name}.jsonl", texts)
    output = tmp_path / name
    common = ("--input", source, "--tokenizer", tokenizer, "--output", output, "--workers", 1)
    status, text = _run(capsys, *common, *options)
    assert status == 0, text
    return output, text


def _documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1, "a document is one sequence"
    return [dataset[i].tolist() for i in range(len(dataset))]


def _texts(prefix):
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    documents = _documents(prefix)
    assert all(ids[-1] == END for ids in documents)
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents]


def test_the_texts_come_back_in_their_order_with_their_sizes(tmp_path, capsys):
    prefix, text = _prepare(tmp_path, capsys)
    assert _texts(prefix) == TEXTS
    record = json.loads((tmp_path / "set.json").read_text())
    size = sum(len(text.encode()) for text in TEXTS)
    tokens = sum(map(len, _documents(prefix)))
    assert record["sets"] == {"": {"documents": 60, "tokens": tokens, "bytes": size}}
    row = next(line for line in text.splitlines() if line.startswith(str(prefix)))
    assert row.split()[1:4] == ["60", f"{tokens:,}", f"{size:,}"]
    assert "each document ends with <|endoftext|> (0)" in text
    assert f"--data-path {prefix}" in text


def test_ids_are_those_of_megatron_s_own_tokenizer(tmp_path, capsys):
    from megatron.core.tokenizers import MegatronTokenizer

    prefix, _ = _prepare(tmp_path, capsys)
    megatron = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(TOKENIZER), metadata_path={"library": "huggingface"}
    )
    assert _documents(prefix) == [[*megatron.tokenize(text), megatron.eod] for text in TEXTS]


def test_megatron_trains_on_it(tmp_path, capsys):
    """Samples of ``GPTDataset``, in document order, are the documents one after the other."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    prefix, _ = _prepare(tmp_path, capsys, TEXTS, "--held-out", "0.2")
    length = 32
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend_per_split=[([str(prefix)], None), ([f"{prefix}_held_out"], None), None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            tokenizer_path=str(TOKENIZER), metadata_path={"library": "huggingface"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [None, None, None], lambda: True, config
    ).build()
    for dataset, documents in (
        (train, _documents(prefix)),
        (valid, _documents(f"{prefix}_held_out")),
    ):
        order = np.concatenate([documents[i] for i in dataset.document_index])
        seen = {tuple(dataset[i]["tokens"].tolist()) for i in range(len(dataset))}
        starts = range(0, len(order) - length, length)
        assert len(starts) > 3
        assert seen == {tuple(order[start : start + length].tolist()) for start in starts}


def test_the_same_documents_are_held_out_whatever_stands_beside_them(tmp_path, capsys):
    first, _ = _prepare(tmp_path, capsys, TEXTS, "--held-out", "0.3", name="a")
    train, held_out = _texts(first), _texts(f"{first}_held_out")
    assert len(held_out) in range(8, 30)
    assert sorted(train + held_out) == sorted(TEXTS)
    more = [*(f"more {i}" for i in range(20)), *reversed(TEXTS), *TEXTS[:7]]
    second, _ = _prepare(tmp_path, capsys, more, "--held-out", "0.3", name="b")
    again = _texts(f"{second}_held_out")
    assert set(held_out) == set(again) & set(TEXTS)
    assert not set(again) & set(_texts(second)), "copies are on the same side"
    other, _ = _prepare(tmp_path, capsys, TEXTS, "--held-out", "0.3", "--seed", "1", name="c")
    assert set(_texts(f"{other}_held_out")) != set(held_out)


def test_the_hash_that_holds_out_stays_what_it_is():
    """Held-out sets of before must be held out by later versions too."""
    digest = hashlib.blake2b(b"text", digest_size=8, key=b"3").digest()
    share = int.from_bytes(digest, "big") / 2**64
    assert is_held_out(b"text", share * 1.0001, 3)
    assert not is_held_out(b"text", share * 0.9999, 3)
    assert sum(is_held_out(b"%d" % i, 0.1, 0) for i in range(10_000)) == pytest.approx(
        1000, rel=0.1
    )
    assert not any(is_held_out(b"%d" % i, 0.0, 0) for i in range(100))


def test_several_processes_write_the_same_bytes(tmp_path, capsys):
    texts = [text * 400 for text in TEXTS]
    one, _ = _prepare(tmp_path, capsys, texts, "--held-out", "0.3", name="one")
    two, text = _prepare(tmp_path, capsys, texts, "--held-out", "0.3", "--workers", "2", name="two")
    assert len(list(read_lines([tmp_path / "one.jsonl"]))) > 1
    for ending in (".bin", ".idx", "_held_out.bin", "_held_out.idx"):
        name = prepare_module.HELD_OUT
        assert ending.startswith((name, "."))
        assert (
            one.with_name(f"one{ending}").read_bytes() == two.with_name(f"two{ending}").read_bytes()
        )
    assert "with 2 processes" in text


def test_options_of_fields_ends_and_files(tmp_path, capsys):
    paths = [_write(tmp_path / f"{i}.jsonl", TEXTS[i : i + 3], "content") for i in (0, 3)]
    output = tmp_path / "deep" / "er" / "set"
    common = ("--tokenizer", TOKENIZER, "--output", output, "--workers", 1, "--field", "content")
    status, text = _run(capsys, "--input", *paths, *common, "--no-append-eod")
    assert status == 0
    assert "documents have no token that ends them" in text
    assert not any(END in ids for ids in _documents(output))
    assert sorted(os.listdir(output.parent)) == ["set.bin", "set.idx", "set.json"]


def test_what_is_left_out_and_what_may_surprise_is_told(tmp_path, capsys):
    texts = ["", "one", "two <|endoftext|> in one", "three<|endoftext|>"]
    prefix, text = _prepare(tmp_path, capsys, texts)
    assert "1 lines without text were left out" in text
    assert "1 documents hold <|endoftext|> within their text as well" in text
    documents = _documents(prefix)
    assert [ids.count(END) for ids in documents] == [1, 2, 1], "not ended twice"


def _small_tokenizer(folder, *, post=True, **config):
    """Bytes, with a beginning token that the tokenizer adds, and an absurd truncation."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<other>"])
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    tokenizer.enable_truncation(5)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder, tokenizer


def test_the_tokenizer_s_own_tokens_and_no_truncation(tmp_path, capsys):
    folder, tokenizer = _small_tokenizer(tmp_path / "hf", bos_token="<s>", eos_token="</s>")
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    prefix, _ = _prepare(tmp_path, capsys, TEXTS[:3], tokenizer=folder)
    for ids, text in zip(_documents(prefix), TEXTS, strict=False):
        assert (ids[0], ids[-1]) == (begin, end)
        assert len(ids) == len(text.encode()) + 2
    plain, _ = _prepare(
        tmp_path, capsys, TEXTS[:3], "--no-special-tokens", tokenizer=folder, name="plain"
    )
    assert _documents(plain) == [ids[1:] for ids in _documents(prefix)]
    other, text = _prepare(
        tmp_path, capsys, TEXTS[:3], "--eod-token", "<other>", tokenizer=folder, name="other"
    )
    assert {ids[-1] for ids in _documents(other)} == {tokenizer.token_to_id("<other>")}
    assert "Megatron takes </s> for the end of a document" in text


def test_a_tokenizer_without_an_end_is_refused_unless_told(tmp_path, capsys):
    folder, _ = _small_tokenizer(tmp_path / "hf")
    source = _write(tmp_path / "a.jsonl", TEXTS[:2])
    common = (
        "--input",
        source,
        "--tokenizer",
        folder,
        "--output",
        tmp_path / "set",
        "--workers",
        1,
    )
    status, text = _run(capsys, *common)
    assert status == 2
    assert "--eod-token: the tokenizer names no token that ends a document" in text
    assert "name it, such as </s>, or give --no-append-eod" in text
    status, text = _run(capsys, *common, "--eod-token", "<end>")
    assert (status, "'<end>' is no token of the tokenizer; name one, such as </s>" in text) == (
        2,
        True,
    )
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "hf"]
    assert _run(capsys, *common, "--eod-token", "</s>")[0] == 0


def test_ids_beyond_the_rows_of_the_model(tmp_path, capsys):
    shutil.copytree(TOKENIZER, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({"vocab_size": 4000}))
    _, text = _prepare(tmp_path, capsys, TEXTS[:3], tokenizer=tmp_path / "hf")
    assert "of a vocabulary of 2,048; the model in its folder has 4,000 rows" in text
    config.write_text(json.dumps({"text_config": {"vocab_size": 300}}))
    source = _write(tmp_path / "b.jsonl", ["a", TEXTS[0]])
    common = ("--input", source, "--tokenizer", tmp_path / "hf", "--output", tmp_path / "b")
    status, text = _run(capsys, *common, "--workers", 1)
    assert status == 2
    assert "b.jsonl' line 2 has id" in text
    assert "the model of the tokenizer's folder has 300 rows; use the tokenizer" in text
    assert not (tmp_path / "b.bin").exists()


def test_a_mistake_late_in_the_files_leaves_nothing(tmp_path, capsys):
    source = _write(tmp_path / "a.jsonl", [text * 500 for text in TEXTS])
    source.write_text(source.read_text() + "{\n")
    assert len(list(read_lines([source]))) > 1
    for workers in (1, 2):
        common = ("--input", source, "--tokenizer", TOKENIZER, "--output", tmp_path / "set")
        status, text = _run(capsys, *common, "--workers", workers, "--held-out", "0.5")
        assert (status, "line 61 is no JSON" in text) == (2, True)
        assert os.listdir(tmp_path) == ["a.jsonl"]


def test_interrupted_and_a_full_disk(tmp_path, monkeypatch):
    source = _write(tmp_path / "a.jsonl", TEXTS)
    given = (load_tokenizer("--tokenizer", TOKENIZER), Encoding(end=END))

    def interrupted(chunks):
        yield from chunks
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_module.prepare([source], tmp_path / "set", *given, watch=interrupted)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "finalize", full)
    with pytest.raises(RecipeError, match=r"set' cannot be written \(No space left on device\)"):
        prepare_module.prepare([source], tmp_path / "set", *given)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json", "_held_out.idx"])
def test_an_output_that_is_there(tmp_path, ending):
    source = _write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / f"set{ending}").write_bytes(b"mine")
    given = (load_tokenizer("--tokenizer", TOKENIZER), Encoding(held_out=0.5))
    with pytest.raises(RecipeError, match=rf"--output: .*set{ending}' is there already; remove it"):
        prepare_module.prepare([source], tmp_path / "set", *given)
    assert (tmp_path / f"set{ending}").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("texts", "options", "problem"),
    [
        ([], (), "--input: no document is in these files"),
        (["", ""], (), "--input: no document is in these files"),
        (["a"], ("--held-out", 1e-9), "--held-out: of 1 documents none is held out"),
        (["a"], ("--held-out", 0.999999), "--held-out: of 1 documents none is left to train on"),
        (["a"], ("--held-out", 1), "--held-out: 1.0 is no share"),
        (["a"], ("--workers", 0), "--workers: 0 is below 1"),
        (["a"], ("--output", "."), "--output: '.' is a folder"),
        (["a"], ("--no-append-eod", "--eod-token", "x"), "--eod-token: goes with --append-eod"),
        (["a"], ("--tokenizer", "Qwen/Qwen3-30B-A3B"), "is no directory on this machine"),
        (["a"], ("--tokenizer", "/tmp"), "holds no tokenizer that transformers reads"),
        (["a"], ("--input", "nothing.jsonl"), "'nothing.jsonl' is not there"),
        (["a"], ("--field", "body"), "has no 'body'; name one of its keys with --field: 'text'"),
    ],
)
def test_mistakes(tmp_path, capsys, texts, options, problem):
    source = _write(tmp_path / "a.jsonl", texts)
    common = ("--input", source, "--tokenizer", TOKENIZER, "--output", tmp_path / "set")
    status, text = _run(capsys, *common, "--workers", 1, *options)
    assert status == 2
    assert problem in text
    assert len(text.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_tokenizer_that_is_not_built_on_tokenizers(tmp_path):
    """Its own call gives the ids."""

    class NotFast:
        def __call__(self, text, **options):
            assert options == {"add_special_tokens": True, "verbose": False}
            return load(text)

    load = load_tokenizer("--tokenizer", TOKENIZER)
    source = _write(tmp_path / "a.jsonl", TEXTS[:4])
    encoder = Encoder(load_tokenizer("--tokenizer", TOKENIZER), Encoding(end=END))
    (lines,) = read_lines([source])
    fast = encoder.documents(lines)
    encoder = Encoder(NotFast(), Encoding(end=END))
    slow = encoder.documents(lines)
    assert np.array_equal(fast.ids, slow.ids)
    assert fast.ids.dtype == slow.ids.dtype == np.int32


def test_tokenizers_that_are_damaged(tmp_path):
    shutil.copytree(TOKENIZER, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(RecipeError, match=r"--tokenizer: .* holds no tokenizer that transformers"):
        load_tokenizer("--tokenizer", tmp_path / "hf")
