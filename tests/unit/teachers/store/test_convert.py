"""Stores of what DistillKit has captured: its rows, its files, and a whole conversion."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_inject import cli
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.teachers.store import convert
from megatron_moe_inject.teachers.store.distillkit import CONFIG, Capture, Packing, big_endian
from megatron_moe_inject.teachers.store.reader import Store

# What DistillKit's own LogprobCompressor, at commit a61c2e7, made of random rows and read back.
ROWS = json.loads(Path(__file__).with_name("distillkit_rows.json").read_text())
VOCABULARY = 101


def failure(problem, remedy):
    return fail("SOURCE", "s", problem, remedy)


def bytes_of(rows):
    return torch.tensor([list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8)


@pytest.mark.parametrize("case", ROWS, ids=[f"k{case['config']['k']}" for case in ROWS])
def test_rows_are_read_as_distillkit_reads_them(case):
    packing, content = Packing.of(case["config"]), bytes_of(case["rows"])
    assert content.shape[1] == packing.row_bytes
    expected = torch.tensor(case["expect"])
    torch.testing.assert_close(packing.log_probs(content), expected, rtol=0, atol=1e-6)
    ids = big_endian(bytes_of(case["ids"]), packing.id_bits, packing.k)
    assert ids.tolist() == case["expect_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 200}, "do not fit"),
        ({"residual_bins": [dict(scale_dtype="float16", element_bits=3, num_elements=9)]}, "bins"),
        ({"polynomial_terms": ["cos"]}, "are not known"),
        ({"exact_dtype": "int8"}, "int8"),
        ({"scale": 2}, "scale is not known"),
    ],
)
def test_a_packing_that_is_none(change, message):
    with pytest.raises((ValueError, KeyError), match=message):
        Packing.of(ROWS[0]["config"] | change)


class Listed:
    """Samples of random tokens, with some ids of each from a fixed random teacher."""

    files = ()
    vocab_size, slots = VOCABULARY + 3, 9
    lengths = (5, 1, 12, 0, 30, 2)

    def __init__(self, folder):
        (folder / "captured").write_text("x")
        self.files = [folder / "captured"]

    def texts(self):
        rng = np.random.default_rng(0)
        for length in self.lengths:
            yield rng.integers(0, VOCABULARY, length)

    def said(self):
        for number, length in enumerate(self.lengths):
            generator = torch.Generator().manual_seed(number)
            log_probs = torch.randn(max(0, length - 1), VOCABULARY, generator=generator) * 3
            top, ids = log_probs.log_softmax(-1).topk(9)
            top[::2, 7:] = -torch.inf
            yield ids, top


@pytest.fixture
def converted(tmp_path, monkeypatch, capsys):
    """Converts ``Listed``; the status, what was printed, and the folder."""
    monkeypatch.setattr(convert, "_kept", lambda source, failure: Listed(tmp_path))

    def run(*options):
        command = ["convert-store", "distillkit:captured", "--output", str(tmp_path / "store")]
        command += ["--data", str(tmp_path / "text"), "--shard-tokens", "10", *options]
        status = cli.main(command)
        printed = capsys.readouterr()
        return status, printed.out + printed.err, tmp_path

    return run


def test_a_conversion_is_a_store_and_its_text(converted):
    status, told, folder = converted("--vocab-size", "101", "--log-probs", "fp32")
    assert status == 0, told
    assert "45 tokens of 6 documents" in told
    kept, store = Listed(folder), Store(folder / "store", failure)
    plan = store.manifest.plan
    assert (plan.labels, plan.temperatures, plan.vocab_size) == (False, [1.0], 101)
    assert list(plan.teacher.weights) == ["captured"]
    assert len(store.manifest.shards) > 2
    data = IndexedDataset(str(folder / "text"))
    assert data.sequence_lengths.tolist() == list(Listed.lengths)
    place = 0
    for number, (tokens, (ids, log_probs)) in enumerate(
        zip(kept.texts(), kept.said(), strict=True)
    ):
        assert data[number].tolist() == tokens.tolist()
        content, counts = store.read(0, np.arange(place, place + len(tokens)))
        place += len(tokens)
        rows = store.layout.decode(torch.from_numpy(content), torch.from_numpy(counts))
        if not len(ids):
            continue
        assert rows.label is None
        assert rows.tokens[:-1].tolist() == tokens[:-1].tolist()
        assert counts.tolist() == [*(log_probs > -torch.inf).sum(-1).tolist(), 0]
        whole = torch.full((len(ids), VOCABULARY + 1), -torch.inf)
        found = whole.scatter(1, rows.ids[:-1].where(rows.ids[:-1] >= 0, 101), rows.at(0, 1.0)[:-1])
        expected = whole.scatter(1, ids, log_probs)
        torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=1e-5, atol=1e-5)
        rest = 1 - log_probs.exp().sum(-1)
        torch.testing.assert_close(rows.log_rest[:-1, 0].exp(), rest, rtol=1e-4, atol=1e-6)


def test_nothing_is_written_over(converted):
    assert converted()[0] == 0
    status, told, folder = converted()
    assert status == 2
    assert "store' is there already" in told or "is there already; name a new folder" in told
    (folder / "store").rename(folder / "other")
    status, told, _ = converted()
    assert status == 2
    assert ".bin is there already; name another prefix" in told


def test_an_id_beyond_the_tokenizer_is_named(converted):
    status, told, folder = converted("--vocab-size", "50")
    assert status == 2
    assert re.search(r"holds id \d+, and there are 50 ids; name the teacher's --tokenizer", told)
    assert not list(folder.glob("text*"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("megatron:/cache", "keeps ids by training step and not the text"),
        ("parquet:/x", "is no source; write distillkit:/dir"),
        ("distillkit:/nowhere/at/all", "is no directory on this machine"),
    ],
)
def test_sources_that_are_none(source, message, tmp_path, capsys):
    files = ["--output", str(tmp_path / "store"), "--data", str(tmp_path / "text")]
    assert cli.main(["convert-store", source, *files]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def capture(tmp_path):
    """A folder as ``sample_logits_vllm`` writes it, of two files."""
    pyarrow = pytest.importorskip("pyarrow")
    import yaml
    from pyarrow import parquet

    case = ROWS[0]
    folder = tmp_path / "captured"
    folder.mkdir()
    (folder / CONFIG).write_text(yaml.safe_dump(case["config"]))
    rows = [list(bytes.fromhex(row)) for row in case["rows"]]
    ids = [list(bytes.fromhex(row)) for row in case["ids"]]
    for number, count in enumerate((3, 1)):
        samples = {
            "input_ids": [list(range(count + 1)), [7]],
            "compressed_logprobs": [rows[:count], []],
            "bytepacked_indices": [ids[:count], []],
        }
        types = [pyarrow.list_(pyarrow.uint64())] + [
            pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
        ] * 2
        arrays = [
            pyarrow.array(values, t) for values, t in zip(samples.values(), types, strict=True)
        ]
        table = pyarrow.Table.from_arrays(arrays, list(samples))
        parquet.write_table(table, folder / f"data_{number}.parquet")
    return folder


def test_files_of_distillkit(capture, tmp_path, capsys):
    found = Capture(capture, failure)
    assert [list(text) for text in found.texts()] == [[0, 1, 2, 3], [7], [0, 1], [7]]
    ids, log_probs = next(found.said())
    assert ids.tolist() == ROWS[0]["expect_ids"]
    torch.testing.assert_close(log_probs, torch.tensor(ROWS[0]["expect"]), rtol=0, atol=1e-6)
    outputs = ["--output", str(tmp_path / "store"), "--data", str(tmp_path / "text")]
    assert cli.main(["convert-store", f"distillkit:{capture}", *outputs]) == 0
    assert "4 tokens of 4 documents" in capsys.readouterr().out


def test_files_that_are_damaged_or_joined(capture):
    first, second = (capture / f"data_{n}.parquet" for n in range(2))
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecipeError, match=r"has data_1.parquet, which is damaged"):
        list(Capture(capture, failure).texts())
    first.rename(capture / "data_2.parquet")
    with pytest.raises(RecipeError, match=r"lacks data_0.parquet; copy it again"):
        Capture(capture, failure)
    (capture / CONFIG).write_text("d: 3")
    with pytest.raises(
        RecipeError, match=r"has a compression_config.yaml that is not DistillKit's"
    ):
        Capture(capture, failure)


def test_columns_of_other_kinds(capture):
    import pyarrow
    from pyarrow import parquet

    path = capture / "data_1.parquet"
    table = parquet.read_table(path)
    for name, message in (("labels", "whose samples were joined"), ("x", None)):
        parquet.write_table(table.append_column(name, pyarrow.array([1, 2])), path)
        if message is None:
            list(Capture(capture, failure).said())
            continue
        with pytest.raises(RecipeError, match=message):
            list(Capture(capture, failure).said())
    parquet.write_table(table.drop_columns(["bytepacked_indices"]), path)
    with pytest.raises(RecipeError, match="with other columns"):
        list(Capture(capture, failure).said())
