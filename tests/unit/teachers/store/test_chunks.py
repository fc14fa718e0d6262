"""Rows of chunks of text: what is kept of a token, and which chunks a sample holds whole."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.store.chunk_format import (
    ChunkFormat,
    ChunkRows,
    chunks_of,
    rows_of,
)
from megatron_moe_inject.teachers.store.chunk_rows import ChunkProducer, verify_chunks
from megatron_moe_inject.teachers.store.manifest import StoredChunks, StorePlan, read_manifest
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.rules import check_use
from megatron_moe_inject.teachers.store.writer import StoreWriter, pieces
from tests.harness import own_tokenizers
from tests.harness.stores import failure, plan_of

CHUNKS = StoredChunks({"tokenizer.json": "ab"}, 450)
SIZES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=12)


def places_of(sizes):
    """Labels in chunks of so many, or in none."""
    places = []
    for size, inside in sizes:
        first = len(places)
        places += [first if inside else -1] * size
    return np.array(places)


@pytest.mark.parametrize(("precision", "width"), [("fp16", 5), ("fp32", 7)])
@settings(max_examples=60, deadline=None)
@given(sizes=SIZES)
def test_rows_come_back(precision, width, sizes):
    places = places_of(sizes)
    rng = np.random.default_rng(len(places))
    tokens = rng.integers(0, 1 << 21, len(places))
    log_probs = -rng.exponential(4, len(places))[np.maximum(places, 0)]
    rows = rows_of(places, log_probs)
    layout = ChunkFormat(1 << 21, precision)
    content = layout.encode(tokens, rows)
    assert content.shape == (len(places), width)
    assert layout.widest == width
    assert layout.tokens(torch.from_numpy(content)).tolist() == tokens.tolist()
    back = layout.decode(content)
    for found, expected in zip(back[:3], rows[:3], strict=True):
        assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(back.log_probs, rows.log_probs, rtol=2.0**-11 * (width == 5))


def test_what_is_no_row():
    layout = ChunkFormat(300, "fp16")
    nothing = layout.decode(np.zeros((2, 5), np.uint8))
    assert not (nothing.inside | nothing.first | nothing.last).any()
    rows = rows_of(np.array([0]), np.array([-np.inf]))
    assert layout.decode(layout.encode(np.array([1]), rows)).log_probs == [-65504]
    for value in (0.1, np.nan):
        with pytest.raises(ValueError, match="above 0, or no numbers"):
            layout.encode(np.array([1]), rows_of(np.array([0]), np.array([value])))
    with pytest.raises(ValueError, match="precision='bf16'; use one of fp16, fp32"):
        ChunkFormat(300, "bf16")
    with pytest.raises(ValueError, match="2097153 ids are not among"):
        ChunkFormat((1 << 21) + 1, "fp16")


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_a_sample_has_the_chunks_that_it_holds_whole(sizes, data):
    """A window of a document's labels, some of which do not count."""
    places = places_of(sizes)
    log_probs = -1.0 - np.maximum(places, 0)
    begin = data.draw(st.integers(0, len(places) - 1))
    end = data.draw(st.integers(begin + 1, len(places)))
    counted = np.array(
        data.draw(st.lists(st.booleans(), min_size=end - begin, max_size=end - begin))
    )
    rows = ChunkRows(*(part[None, begin:end] for part in rows_of(places, log_probs)))
    found, said = chunks_of(rows, counted[None])
    expected = []
    for at in range(begin, end):
        members = np.flatnonzero(places == places[at])
        held = places[at] >= 0 and begin <= members[0] and members[-1] < end
        held = held and counted[members - begin].all()
        expected.append(members[0] - begin if held else -1)
    assert found[0].tolist() == expected
    told = np.array(expected) >= 0
    assert (said[0][told] == log_probs[begin:end][told]).all()
    assert not said[0][~told].any()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    student = own_tokenizers.byte_level(folder / "student", 300)
    teacher = own_tokenizers.sentencepiece(folder / "teacher", 450)
    return read_tokenizer(student), read_tokenizer(teacher)


def scores(reading, most):
    """Of the label and the ids before it in its text, in float32."""
    said, end = [], 0
    for length in reading.lengths.tolist():
        inputs = reading.inputs[end : end + length].astype(np.float64)
        before = np.cumsum(inputs)
        said.append(-((before * 7 + reading.labels[end : end + length]) % 13) / 5)
        end += length
    return torch.from_numpy(np.concatenate(said)).float()


def documents(student, lengths):
    (ids,) = student.encode(["".join(own_tokenizers.texts()[:3])])
    ids, parts, at = list(ids), [], 0
    for length in lengths:
        own = [*ids[at : at + length - 1], student.end][-length:] if length else []
        parts.append(own)
        at += length
    return np.array([i for part in parts for i in part], np.int64)


def plan(**changes) -> StorePlan:
    usual = dict(slots=1, log_probs="fp32", temperatures=[1.0], context=400, overlap=8,
                 labels=False, chunks=CHUNKS)  # fmt: skip
    return plan_of(**{**usual, **changes})


@pytest.mark.parametrize("prefix", [(), (1,)])
def test_documents_are_read_as_samples_are(tokenizers, prefix):
    """What a store says of a document is what the teacher says of a sample that is the document."""
    student, teacher = tokenizers
    lengths = [40, 0, 1, 2, 75, 33]
    tokens = documents(student, lengths)
    reader = Reader(student, teacher, prefix)
    known, rows = ChunkProducer(reader, scores, plan(), 100).chunks(tokens, lengths)
    ends = np.cumsum(lengths)
    assert len(known) == sum(max(0, length - 1) for length in lengths)
    at = 0
    for length, end in zip(lengths, ends, strict=True):
        if length < 2:
            continue
        own = tokens[end - length : end]
        starts = np.arange(length)[None] == 0
        reading = reader.read(own[None], np.array([-1]), np.ones((1, length), bool), starts)
        part = ChunkRows(*(of[None, at : at + length - 1] for of in rows))
        at += length - 1
        if not len(reading.lengths):
            assert not part.inside.any()
            continue
        sums = np.zeros(length + 1)
        np.add.at(sums, reading.numbers, scores(reading, 0).numpy())
        places, said = chunks_of(part, np.ones((1, length - 1), bool))
        assert places[0].tolist() == reading.places[0, :-1].tolist()
        told = places[0] >= 0
        assert told.mean() > 0.8 or length < 3
        np.testing.assert_allclose(said[0][told], sums[places[0][told]], rtol=1e-6)


def test_long_documents_go_through_in_spans(tokenizers):
    """Each of the teacher's tokens is asked about once, those of a span behind some that the one
    before has read; which chunks there are does not depend on it."""
    student, teacher = tokenizers
    lengths = [150, 9]
    tokens = documents(student, lengths)
    whole = ChunkProducer(Reader(student, teacher, (1,)), scores, plan(), 100)
    asked = []

    def seen(reading, most):
        asked.append(reading)
        return scores(reading, most)

    cut = ChunkProducer(Reader(student, teacher, (1,)), seen, plan(context=24, overlap=8), 100)
    (_, rows), (_, other) = whole.chunks(tokens, lengths), cut.chunks(tokens, lengths)
    for found, expected in zip(other[:3], rows[:3], strict=True):
        assert found.tolist() == expected.tolist()
    (reading,) = asked
    assert reading.lengths.max() <= 1 + 24
    begins = np.cumsum(reading.lengths) - reading.lengths
    assert (reading.inputs[begins] == 1).all(), "the prefix stands in front of each"
    at_once = whole._reader.read_documents(tokens, lengths, whole._spans)
    for chunk in np.unique(at_once.numbers[at_once.numbers < len(tokens)]):
        same = [r.labels[r.numbers == chunk].tolist() for r in (reading, at_once)]
        assert same[0] == same[1]


def test_written_and_verified(tokenizers, tmp_path):
    """Over several shards, by a second writer that goes on; a reader finds every row."""
    student, teacher = tokenizers
    lengths = np.array([60, 1, 80, 50, 0, 31])
    tokens = documents(student, lengths.tolist())
    data = dataclasses.replace(plan_of().data[0], documents=6, tokens=len(tokens), last=6)
    own = plan(data=[data], shard_tokens=50, vocab_size=300)
    starts = np.cumsum(lengths) - lengths
    producer = ChunkProducer(Reader(student, teacher), scores, own, 100)
    for _ in range(2):
        writer = StoreWriter(tmp_path / "s", own, list(pieces(own, [lengths], [starts])), failure)
        for piece in writer.missing[:2]:
            text = tokens[piece.first_token : piece.first_token + piece.lengths.sum()]
            writer.write(piece, producer.rows(text, piece.lengths.tolist()))
    manifest = writer.finish(lambda: ["c" * 64])
    assert manifest is not None
    assert len(manifest.shards) > 2
    assert read_manifest(tmp_path / "s", failure).plan.chunks == CHUNKS
    store = Store(tmp_path / "s", failure)
    content, counts = store.read(0, np.arange(len(tokens)))
    assert (counts > 0).sum() == manifest.rows
    known, rows = producer.chunks(tokens, lengths.tolist())
    back = store.layout.decode(content[known])
    assert back.inside.any()
    for found, expected in zip(back, rows, strict=True):
        assert found.tolist() == expected.tolist()

    def louder(reading, most):
        return scores(reading, most) - 0.25

    other = ChunkProducer(Reader(student, teacher), louder, own, 100)
    places = np.arange(len(tokens))
    same = verify_chunks(store, (producer, other), tokens, lengths.tolist(), places, 0)
    assert same.others == 0
    assert same.store.max() == 0
    assert same.itself.min() >= 0.25 - 1e-6
    assert "0 labels are in another chunk" in same.told()
    off = verify_chunks(store, (other, producer), tokens, lengths.tolist(), places, 0)
    assert off.store.min() >= 0.25 - 1e-6
    strange = ChunkProducer(Reader(student, student), scores, own, 100)
    cut = verify_chunks(store, (strange, strange), tokens, lengths.tolist(), places, 0)
    assert cut.others > 20


def test_identities_of_older_stores_stay():
    """A plan without chunks is named as it was before there were any."""
    assert plan_of().identity == (
        "e1cc8f2632917a245885194b0a59fc0ee2d7a107b55a90c8f49a0d63db63d997"
    )
    assert plan().identity != plan_of().identity


RECIPE = """
domains: [{name: code, data: [1], teacher: coder, experts: {layers: {1: [0]}}}]
teachers: {coder: {source: "store:/s", align: ALIGN}}
objective: {alpha: 0.5, temperature: 7}
"""


def test_which_store_a_recipe_can_read():
    aligned, ids = (recipe_from_yaml(RECIPE.replace("ALIGN", a)) for a in ("chunks", "none"))
    check_use(aligned, "coder", plan())
    with pytest.raises(RecipeError, match=r"align: .none. asks for ids of the stud"):
        check_use(ids, "coder", plan())
    with pytest.raises(RecipeError, match="compares chunks of text, and store:/s has ids"):
        check_use(aligned, "coder", plan_of())
    for key, value, says in (
        ("tail", "renormalize", "is of ids that are not told"),
        ("prefix", "bos", "is of a model, and a store runs none"),
        ("ranks", "last", "is of a model, and a store runs none"),
    ):
        text = RECIPE.replace("ALIGN", f"chunks, {key}: {value}")
        with pytest.raises(RecipeError, match=says):
            recipe_from_yaml(text)
