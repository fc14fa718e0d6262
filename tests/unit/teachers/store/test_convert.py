"""Stores of what DistillKit has captured: its rows, its files, and a whole conversion."""

import json
import re
import shutil
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
    monkeypatch.setattr(convert, "_kept", lambda options, failure: Listed(tmp_path))

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
        ("parquet:/x", "is no source; write distillkit:/dir or megatron:/dir"),
        ("megatron:", "is no source; write distillkit:/dir or megatron:/dir"),
        ("megatron:/nowhere/at/all", "is no directory on this machine"),
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


RUN = {"seed": 7, "seq_length": 16, "train_iters": 4, "micro_batch_size": 2, "global_batch_size": 8}
CP = DP = 2
K = 3


def said_of(token):
    """Ids and log-probabilities of a teacher that looks at the last token alone."""
    ids = [(7 * token + 13 * j) % VOCABULARY for j in range(K)]
    return ids, [-0.5 - j - token / 1000 for j in range(K)]


@pytest.fixture
def cache(tmp_path):
    """A folder as Megatron's ``LogitsSaverHooks`` writes it, at CP 2 and DP 2, and the run's flags.

    Sample n of the run is micro-batch by micro-batch dealt to the data-parallel ranks; context-
    parallel rank r has pieces r and 2 CP - 1 - r of each.
    """
    zstandard = pytest.importorskip("zstandard")
    import io
    import tarfile

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(3)
    for name in ("one", "two"):
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint16)
        for length in rng.integers(3, 60, 40).tolist():
            builder.add_document(torch.from_numpy(rng.integers(0, VOCABULARY, length)), [length])
        builder.finalize(f"{tmp_path / name}.idx")
    blend = ["0.3", str(tmp_path / "one"), "0.7", str(tmp_path / "two")]
    flags = ["--data-path", *blend, "--split", "100,0,0", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", str(VOCABULARY), "--data-cache-path", str(tmp_path / "indices")]
    flags += [x for name, n in RUN.items() for x in (f"--{name.replace('_', '-')}", str(n))]
    args = convert._run_flags(flags)
    args.data_parallel_size = DP

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_moe_inject.host.batches import dataset_config

    sizes = [32, 1, 1]
    config = dataset_config(args)
    data, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    blended = {"kind": "blend", "blend": [[0.3, "one"], [0.7, "two"]]}
    identifiers = {"seed": 7, "sequence_length": 16, "train_samples": 32, "blend": blended}
    meta = {"hash": "x", "identifiers": identifiers, "saver": {"k": K, "p": None}}
    folder = tmp_path / "cache"
    folder.mkdir()
    pieces = torch.arange(16).chunk(2 * CP)
    for cp in range(CP):
        places = torch.cat([pieces[cp], pieces[2 * CP - 1 - cp]]).tolist()
        for dp in range(DP):
            for last in (1, 3):
                members = [("_meta.json", json.dumps(meta).encode())]
                for iteration in (last - 1, last):
                    lists = {"values": [], "indices_low": [], "bit_17": []}
                    for micro in range(2):
                        first = iteration * 8 + micro * 2 * DP + dp * 2
                        samples = [data[first + b]["tokens"].tolist() for b in range(2)]
                        said = [[said_of(tokens[s]) for tokens in samples] for s in places]
                        ids = torch.tensor([[one[0] for one in row] for row in said])
                        values = torch.tensor([[one[1] for one in row] for row in said])
                        lists["values"].append(values)
                        lists["indices_low"].append((ids & 0xFFFF).to(torch.uint16))
                        lists["bit_17"].append((ids >> 16).to(torch.bool))
                    buffer = io.BytesIO()
                    torch.save(lists, buffer)
                    packed = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
                    members.append((f"{iteration}.pt.zst", packed))
                with tarfile.open(folder / f"cp{cp}_dp{dp}__{last}.tar", "w") as tar:
                    for name, content in members:
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return folder, flags, [data[n] for n in range(32)]


def convert_cache(folder, flags, tmp_path, *options):
    outputs = ["--output", str(tmp_path / "store"), "--data", str(tmp_path / "text")]
    size = ["--vocab-size", str(VOCABULARY), "--log-probs", "fp32"]
    command = ["convert-store", f"megatron:{folder}", *outputs, *size, *options]
    return cli.main([*command, "--", *flags] if flags else command)


def test_megatrons_cache_is_about_the_samples_of_its_run(cache, tmp_path, capsys):
    folder, flags, data = cache
    status = convert_cache(folder, flags, tmp_path, "--trust-pickle")
    assert status == 0, capsys.readouterr()
    store, text = Store(tmp_path / "store", failure), IndexedDataset(str(tmp_path / "text"))
    assert text.sequence_lengths.tolist() == [17] * 32
    # In the order in which ranks had them: micro-batch by micro-batch, rank by rank.
    for number, sample in enumerate(data):
        tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert text[number].tolist() == tokens
        content, counts = store.read(0, np.arange(17 * number, 17 * number + 16))
        rows = store.layout.decode(torch.from_numpy(content), torch.from_numpy(counts))
        for row, token in enumerate(tokens[:-1]):
            ids, log_probs = said_of(token)
            found = dict(zip(rows.ids[row].tolist(), rows.at(0, 1.0)[row].tolist(), strict=True))
            assert found == pytest.approx(dict(zip(ids, log_probs, strict=True)), abs=1e-5)


def test_a_cache_of_another_run_and_pickles_that_are_not_trusted(cache, tmp_path, capsys):
    folder, flags, _ = cache
    for changed, options, message in (
        (flags, (), "holds pickles, which may come from anybody; add --trust-pickle"),
        ([], ("--trust-pickle",), "put -- and the flags of the run that saved the cache"),
        ([*flags, "--seed", "8"], ("--trust-pickle",), "says seed 7, and the flags 8"),
        ([*flags, "--micro-batch-size", "1"], ("--trust-pickle",), "with micro-batches [("),
        ([*flags, "--rampup-batch-size", "2", "2", "8"], ("--trust-pickle",), "--rampup-batch-si"),
    ):
        assert convert_cache(folder, changed, tmp_path, *options) == 2
        assert message in capsys.readouterr().err
        for path in (tmp_path / "text.bin", tmp_path / "text.idx"):
            path.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    path = folder / "cp1_dp0__3.tar"
    kept = path.read_bytes()
    path.write_bytes(kept[:3000])
    assert convert_cache(folder, flags, tmp_path, "--trust-pickle") == 2
    assert "has cp1_dp0__3.tar" in capsys.readouterr().err


def test_a_pickle_that_does_something_is_refused(cache, tmp_path, capsys):
    """Only tensors are read, whoever is trusted."""
    import io
    import pickle
    import tarfile

    import zstandard

    folder, flags, _ = cache
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return Path.touch, (ran,)

    path = folder / "cp0_dp0__1.tar"
    with tarfile.open(path) as tar:
        meta = tar.extractfile("_meta.json").read()
    evil = zstandard.ZstdCompressor().compress(pickle.dumps({"values": Runs()}))
    with tarfile.open(path, "w") as tar:
        for name, content in (("_meta.json", meta), ("0.pt.zst", evil), ("1.pt.zst", evil)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert convert_cache(folder, flags, tmp_path, "--trust-pickle") == 2
    assert "has cp0_dp0__1.tar, which is damaged" in capsys.readouterr().err
    assert not ran.exists()
