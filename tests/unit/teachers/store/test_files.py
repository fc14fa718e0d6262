"""A store as files: what was written is read, whatever was damaged, cut off or exchanged is not."""

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers.store import reader as reading
from megatron_moe_inject.teachers.store.manifest import (
    MANIFEST,
    PLAN,
)
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.writer import StoreWriter, pieces
from tests.harness.stores import LENGTHS, STARTS, TEACHER, content_of, failure, plan_of, said, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "whole"
    assert write(folder) is not None
    return folder


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mass", [None, 0.8])
def test_any_tokens_in_any_order_come_back(tmp_path, mass, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_SHARDS", 2)
    write(tmp_path / "store", plan_of(mass))
    store, rng = Store(tmp_path / "store", failure), np.random.default_rng(0)
    assert len(store.manifest.shards) > 8
    assert store.manifest.rows == sum(np.maximum(lengths - 1, 0).sum() for lengths in LENGTHS)
    assert store.manifest.bytes == sum(
        path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors")
    )
    for data in (0, 1):
        rows, count = said(data, mass), int(LENGTHS[data].sum())
        last = np.zeros(count, bool)
        last[(STARTS[data] + LENGTHS[data] - 1)[LENGTHS[data] > 0]] = True
        for tokens in (rng.permutation(count), np.arange(70, 300), rng.integers(count, size=64)):
            content, counts = store.read(data, tokens)
            back = store.layout.decode(torch.from_numpy(content), torch.from_numpy(counts))
            assert ((counts == 0) == last[tokens]).all()
            there = torch.from_numpy(~last[tokens])
            assert torch.equal(back.ids[there], rows.ids[tokens][there])
            assert torch.equal(back.tokens[there], rows.tokens[tokens][there])
            assert (back.ids[~there] == -1).all()


def test_a_token_that_is_not_there_is_named(tmp_path):
    data = [dataclasses.replace(data, first=10, last=50) for data in plan_of().data]
    write(tmp_path / "part", plan_of(data=data))
    store = Store(tmp_path / "part", failure)
    store.read(1, np.array([STARTS[1][10], STARTS[1][50] - 1]))
    for token in (STARTS[1][10] - 1, STARTS[1][50]):
        message = f"says nothing about token {token:,} of text1: it has documents 10 to 49 of 60;"
        with pytest.raises(RecipeError, match=message):
            store.read(1, np.array([STARTS[1][20], token]))


def test_a_document_has_one_row_less_than_tokens(tmp_path):
    plan = plan_of()
    writer = StoreWriter(tmp_path / "store", plan, pieces(plan, LENGTHS, STARTS), failure)
    piece = writer.missing[0]
    content, counts = content_of(piece, plan.row_format, said(0))
    with pytest.raises(ValueError, match=rf"{len(counts) - 1} rows of documents that have"):
        writer.write(piece, (content[1:], counts[1:]))
    assert not (tmp_path / "store" / piece.file).exists()


def test_shards_follow_from_the_plan_and_end_where_they_reach_their_size():
    plan = plan_of()
    own = [piece for piece in pieces(plan, LENGTHS, STARTS) if piece.data == 1]
    assert np.array_equal(np.concatenate([piece.lengths for piece in own]), LENGTHS[1])
    for piece in own[:-1]:
        assert piece.lengths[:-1].sum() < 400 <= piece.lengths.sum()


def test_what_was_interrupted_goes_on_and_is_the_same(whole, tmp_path):
    folder = tmp_path / "store"
    assert write(folder, limit=3) is None
    with pytest.raises(RecipeError, match=r"a store that is not whole.*run moe-inject store-teach"):
        Store(folder, failure)
    first = (folder / "data0-000001.safetensors").stat().st_mtime_ns
    assert write(folder) is not None
    assert (folder / "data0-000001.safetensors").stat().st_mtime_ns == first
    assert files(folder) == files(whole)


def test_several_processes_share_the_shards(whole, tmp_path):
    plan = plan_of()
    writers = [
        StoreWriter(tmp_path / "store", plan, pieces(plan, LENGTHS, STARTS), failure)
        for _ in range(2)
    ]
    for number, piece in enumerate(writers[0].pieces):
        content = content_of(piece, plan.row_format, said(piece.data))
        writers[number % 2].write(piece, content)
    assert writers[1].finish(lambda: ["c" * 64] * 2) is not None
    assert files(tmp_path / "store") == files(whole)


def test_other_settings_do_not_go_into_one_store(tmp_path):
    write(tmp_path / "store", limit=1)
    for key, value, shown in [
        ("slots", 11, "slots is 12 there and 11 now"),
        ("temperatures", [1.0, 3.0], "temperatures is [1.0, 2.0] there"),
        ("teacher", dataclasses.replace(TEACHER, weights={"model.safetensors": "cd"}), "teacher"),
    ]:
        with pytest.raises(RecipeError, match=re.escape(f"with other settings: {shown}")):
            write(tmp_path / "store", plan_of(**{key: value}), rows=[None, None])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(RecipeError, match="a folder with other things"):
        write(tmp_path / "other")


def read_all(folder):
    store = Store(folder, failure)
    for data in (0, 1):
        store.read(data, np.arange(int(LENGTHS[data].sum())))


def test_every_changed_byte_of_a_shard_is_found(store):
    """Each byte that may be changed to any other is in the header, the index or a block."""
    path = store / "data1-000000.safetensors"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    places = {0, 7, 8, 9, len(content) - 1, *rng.integers(len(content), size=120).tolist()}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(
            RecipeError, match=r"--output: 'store' has data1-000000.safetensors, whi"
        ):
            read_all(store)
    path.write_bytes(content)
    read_all(store)


def test_rows_that_are_damaged_do_not_hide_others(store):
    path = store / "data0-000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = Store(store, failure)
    opened.read(0, np.arange(10))
    last = int(opened.manifest.shards[0].tokens) - 2
    with pytest.raises(RecipeError, match=r"was changed or is damaged in rows \d+ and on; copy it"):
        opened.read(0, np.arange(last - 5, last + 1))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_shard_that_was_cut_off_or_is_gone(store, size):
    path = store / "data0-000002.safetensors"
    content = path.read_bytes()
    if size == 0:
        path.unlink()
    else:
        path.write_bytes(content[:size])
    missing = "is not there" if size == 0 else "is cut off"
    with pytest.raises(RecipeError, match=f"lacks a part: data0-000002.*{missing}; copy it again"):
        Store(store, failure)


def test_a_shard_of_another_store_or_place(store, tmp_path):
    write(tmp_path / "other", plan_of(context=32))
    for source in (
        tmp_path / "other" / "data0-000001.safetensors",
        store / "data0-000002.safetensors",
    ):
        target = store / "data0-000001.safetensors"
        kept = target.read_bytes()
        shutil.copy(source, target)
        with pytest.raises(RecipeError, match=r"lacks a part|is not the file that the manifest"):
            read_all(store)
        target.write_bytes(kept)
    shutil.copy(tmp_path / "other" / "data0-000001.safetensors", target)
    (store / MANIFEST).unlink()
    with pytest.raises(RecipeError, match=r"data0-000001.safetensors, which belongs to another st"):
        write(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["plan"].update(slots=0), "keep 1 to 300"),
        (lambda m: m["plan"].update(log_probs="int4"), "use one of packed, bf16, fp32"),
        (lambda m: m["plan"].update(temperatures=[2.0]), "must be positive and begin with 1"),
        (lambda m: m["plan"].update(slots="12"), "plan.slots"),
        (lambda m: m["plan"].pop("context"), "plan.context"),
        (lambda m: m["shards"].pop(3), "is not the one that comes next"),
        (lambda m: m["shards"].pop(), "shards are missing"),
        (lambda m: m["bin_sha256"].pop(), "not every data set has a checksum"),
        (lambda m: m.update(version=1), "is a store of version 1, and 2 is read here"),
        (lambda m: m.update(format="x"), "its format is not 'megatron_moe_inject store'"),
        (lambda m: m.update(more=1), "more: unknown key"),
    ],
)
def test_a_manifest_that_is_none(store, change, message):
    manifest = json.loads((store / MANIFEST).read_text())
    change(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=re.escape(message)):
        Store(store, failure)


def test_a_manifest_of_noise(store):
    content = (store / MANIFEST).read_bytes()
    for noise in (b"", b"\xff\xfe", content[:-40], b"[" * 100_000, b"null", b"[]"):
        (store / MANIFEST).write_bytes(noise)
        with pytest.raises(RecipeError, match=r"^--output: 'store' has a damaged manifest.json"):
            Store(store, failure)
    (store / MANIFEST).unlink()
    (store / PLAN).unlink()
    with pytest.raises(RecipeError, match=r"is no store: manifest.json is not there; name the"):
        Store(store, failure)


def test_a_writer_that_is_killed_leaves_whole_shards(whole, tmp_path):
    """``kill -9`` at 20 moments, then it goes on to the same bytes."""
    folder, rng = tmp_path / "store", np.random.default_rng(5)
    read_end, write_end = os.pipe()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            os.close(read_end)
            try:
                os.write(write_end, b".")
                write(folder, wait=0.004)
            finally:
                os._exit(0)
        os.read(read_end, 1)
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in folder.glob("data*.safetensors"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
        if (folder / MANIFEST).is_file():
            break
    assert write(folder) is not None
    read_all(folder)
    for name, content in files(whole).items():
        assert (folder / name).read_bytes() == content


def test_a_writer_that_was_killed_at_its_first_file_goes_on(whole, tmp_path):
    """What it had begun of the plan lies in the folder, and is no other thing."""
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / f".{PLAN}.{platform.node()}-0123456789ab.part").write_text("{")
    assert write(folder) is not None
    for name, content in files(whole).items():
        assert (folder / name).read_bytes() == content
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").write_text("mine")
    with pytest.raises(RecipeError, match="is a folder with other things"):
        write(tmp_path / "other")


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    from megatron_moe_inject.host import files as host_files

    folder, stock, written = tmp_path / "store", os.fsync, []

    def full(handle):
        written.append(handle)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        stock(handle)

    monkeypatch.setattr(host_files.os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left on device"):
        write(folder)
    monkeypatch.setattr(host_files.os, "fsync", stock)
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    assert 0 < len(there) < 9
    assert not list(folder.glob(".*"))
    assert write(folder) is not None
    assert files(folder) == files(whole)


def test_a_step_with_another_text_than_the_stores_is_noticed(whole):
    """Where index and size are the same, and the bytes that were compared at start."""
    from megatron_moe_inject.teachers.store.step_teacher import StoredSource

    source = StoredSource(Store(whole, failure), {7: 1}, {7: "prose"})
    places, tokens = np.arange(STARTS[1][20], STARTS[1][23]), said(1).tokens.numpy()
    numbered = np.where(np.arange(len(places)) % 5 == 4, -1, places | 7 << 44)
    content, counts = source.read(numbered, tokens[places])
    assert not counts[numbered < 0].any()
    assert counts[numbered >= 0].sum() > 0
    assert content.shape == (len(places), plan_of().row_format.widest)
    other = tokens[places].copy()
    wrong = int(np.flatnonzero(counts)[3])
    other[wrong] += 1
    told = f"than prose: its token {places[wrong]:,} is {tokens[places[wrong]]} in the store and "
    with pytest.raises(RecipeError, match=f"was written from another text {told}"):
        source.read(numbered, other)
