"""Tokenizers by their bytes: what each id stands for, which are refused, and how texts align."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.teachers.align.alignment import align
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.tokenizer_files import UnreadableTokenizer
from tests.harness import own_tokenizers as own

KINDS = ("small bytes", "large bytes", "pieces", "unigram", "prepending", "model file")
SETTINGS = settings(max_examples=60, deadline=None)
ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\tabcdeABC_(=.,é漢\U0001f600\u0301"),
        st.characters(codec="utf-8", exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=80,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    made = {
        "small bytes": own.byte_level(base / "small", 300),
        "large bytes": own.byte_level(base / "large", 900, part=1),
        "pieces": own.sentencepiece(base / "pieces"),
        "unigram": own.sentencepiece(base / "unigram", 600, "Unigram"),
    }
    made["prepending"] = own.prepending(base / "prepending", made["pieces"])
    made["model file"] = model_file(base)
    return made


def model_file(base):
    """A ``tokenizer.model`` of sentencepiece itself."""
    import sentencepiece

    (base / "model").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(own.texts()[:8]).splitlines()),
        model_prefix=str(base / "model" / "tokenizer"),
        vocab_size=700,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return base / "model"


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: read_tokenizer(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(text=ANY_TEXT)
def test_bytes_are_those_of_the_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    (ids,) = tokenizer.encode([text])
    assert tokenizer.bytes_of(ids) in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_exact_ones_are_taken(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokenizer.check_exact()
    assert tokenizer.space_in_front is ("bytes" not in kind)
    assert tokenizer.end is not None
    assert tokenizer.pieces[tokenizer.end] is None
    # The name of a special token in a text is text.
    name = tokenizer.names[tokenizer.end]
    (ids,) = tokenizer.encode([name])
    if kind != "unigram":  # whose model has it among its pieces, whoever asks
        assert tokenizer.end not in ids
        assert tokenizer.bytes_of(ids).strip() == name.encode()


def test_what_gives_no_bytes_back_is_refused(tmp_path, folders):
    word_piece = own.word_piece(tmp_path / "words")
    with pytest.raises(UnreadableTokenizer, match="WordPiece gives no bytes back"):
        read_tokenizer(word_piece)
    lacking = own.sentencepiece(tmp_path / "lacking", fallback=False)
    with pytest.raises(UnreadableTokenizer, match=r"without bytes .* what its tokens lack is lost"):
        read_tokenizer(lacking)
    lower = read_tokenizer(own.lower_case(tmp_path / "lower", folders["small bytes"]))
    with pytest.raises(UnreadableTokenizer, match=r"changes text: b'Ab .* comes back as b'ab"):
        lower.check_exact()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UnreadableTokenizer, match="is damaged"):
        read_tokenizer(tmp_path / "damaged")
    with pytest.raises(UnreadableTokenizer, match=r"holds no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(UnreadableTokenizer, match="WordPiece gives no bytes back"):
        read_tokenizer(tmp_path / "old")


def test_files_of_gpt2_are_as_its_json(tmp_path, folders, tokenizers):
    content = json.loads((folders["small bytes"] / "tokenizer.json").read_text("utf-8"))
    vocabulary = {token: i for token, i in content["model"]["vocab"].items() if token != own.END}
    vocabulary["<|endoftext|>"] = content["model"]["vocab"][own.END]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    read, other = read_tokenizer(tmp_path / "vocab.json"), tokenizers["small bytes"]
    assert list(read.pieces) == list(other.pieces)
    assert read.end == other.end
    text = own.texts()[0]
    assert list(read.encode([text])[0]) == list(other.encode([text])[0])


STARTS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@SETTINGS
@given(STARTS, STARTS)
def test_chunks_are_the_smallest_common_pieces(first, second):
    student, teacher = (np.cumsum([0, *sizes]) for sizes in (first, second))
    found = align(student[:-1], teacher[:-1], (student[-1], teacher[-1]))
    common = sorted(set(student.tolist()) & set(teacher.tolist()))
    assert found.chunks == len(common) - 1
    for cuts, numbers in ((student, found.student), (teacher, found.teacher)):
        for start, end, number in zip(cuts[:-1], cuts[1:], numbers, strict=True):
            inside = start < common[-1]
            assert number == (sum(c <= start for c in common) - 1 if inside else -1)
            if inside:
                assert common[number] <= start
                assert end <= common[number + 1]


def read_one(student, teacher, tokens, *, following=-1, prefix=(), counted=None, starts=None):
    tokens = np.asarray(tokens)[None]
    counted = np.ones(tokens.shape, bool) if counted is None else np.asarray(counted)[None]
    reader = Reader(student, teacher, prefix)
    starts = None if starts is None else np.asarray(starts)[None]
    return reader.read(tokens, np.array([following]), counted, starts)


def chunk_bytes(student, teacher, tokens, reading, labels):
    """Of each chunk the bytes of the student's labels and of the teacher's."""
    pairs = {}
    for place in np.unique(reading.numbers[reading.numbers < reading.places.size]).tolist():
        own_labels = np.flatnonzero(reading.places[0] == place)
        assert own_labels[0] == place
        theirs = reading.labels[reading.numbers == place]
        pairs[place] = (
            student.bytes_of([labels[i] for i in own_labels]),
            teacher.bytes_of(theirs.tolist()),
        )
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_chunks_are_the_same_text(tokenizers, kind, other, data):
    """Of any window of any text, with an end of document somewhere."""
    student, teacher = tokenizers[kind], tokenizers[other]
    documents = data.draw(st.lists(ANY_TEXT, min_size=1, max_size=3))
    stream = []
    for ids in student.encode(documents):
        stream += [*ids, student.end]
    first = data.draw(st.integers(0, max(len(stream) - 4, 0)))
    tokens, following = stream[first:-1], stream[-1]
    if len(tokens) < 2:
        return
    apart = data.draw(st.booleans())
    starts = np.roll(np.asarray(tokens) == student.end, 1)
    starts[0] = True
    reading = read_one(
        student, teacher, tokens, following=following, prefix=(1,) if teacher.begin else (),
        starts=starts if apart else None,
    )  # fmt: skip
    labels = [*tokens[1:], following]
    pairs = chunk_bytes(student, teacher, tokens, reading, labels)
    for ours, theirs in pairs.values():
        # A space in front of the text is the tokenizer's, and is in its first chunk.
        assert theirs in (ours, b" " + ours) or ours == b" " + theirs
    if kind == other and "bytes" in kind and not apart:
        whole = [(a, b) for a, b in pairs.values() if a]
        assert all(a == b for a, b in whole)


def test_same_tokenizer_has_single_tokens(tokenizers):
    for kind in ("small bytes", "large bytes"):
        student = tokenizers[kind]
        (ids,) = student.encode(["def of(x):\n    return x + 1  # and so on\n" * 3])
        reading = read_one(student, student, [*ids, student.end], following=ids[0])
        told = reading.places[0]
        assert (told[told >= 0] == np.flatnonzero(told >= 0)).all()
        assert (told >= 0).mean() > 0.9
        assert reading.inputs.tolist() == [*ids, student.end][: len(reading.inputs)]


def test_what_is_not_told_of(tokenizers):
    """The first token, a masked label with all its chunk, the end of a text that goes on, all from
    a special token on that the teacher lacks, half letters."""
    student, teacher = tokenizers["small bytes"], tokenizers["large bytes"]
    text = "return the number of tokens in the window"
    (ids,) = student.encode([text])
    plain = read_one(student, teacher, ids[:-1], following=ids[-1])
    told = plain.places[0] >= 0
    pairs = chunk_bytes(student, teacher, ids[:-1], plain, ids[1:])
    said = b"".join(ours for ours, _ in (pairs[key] for key in sorted(pairs)))
    assert b" the number of tokens in the" in said
    assert not said.startswith(student.pieces[ids[0]])
    assert b"window" not in said
    ended = read_one(student, teacher, [*ids, student.end])
    pairs = chunk_bytes(student, teacher, ids, ended, [*ids[1:], student.end])
    assert b"".join(ours for ours, _ in (pairs[k] for k in sorted(pairs))).endswith(b"window")

    masked = int(np.flatnonzero(told)[4])
    counted = np.arange(len(ids) - 1) != masked
    less = read_one(student, teacher, ids[:-1], following=ids[-1], counted=counted)
    gone = plain.places[0] == plain.places[0][masked]
    assert ((less.places[0] >= 0) == (told & ~gone)).all()

    more = read_tokenizer(_folder(student), ["<|other|>"])
    strange = more.specials["<|other|>"]
    until = read_one(more, teacher, [*ids, strange, *ids[:-1]], following=ids[-1])
    assert (until.places[0][len(ids) - 1 :] == -1).all()
    assert (until.places[0][: len(ids) - 1] >= 0).sum() >= told.sum()
    assert Reader(more, teacher).lacking == {strange: "<|other|>"}

    (letter,) = student.encode(["漢"])
    assert len(letter) == 3, "bytes of their own"
    halves = [*letter[1:], *ids, letter[0]]
    cut = read_one(student, teacher, halves, following=letter[1])
    assert teacher.bytes_of(cut.inputs.tolist()).startswith(b"return")
    assert (cut.places[0] >= 0).sum() >= told.sum()
    broken = read_one(student, teacher, [*ids, letter[1], *ids])
    assert (broken.places[0][len(ids) - 1 :] == -1).all()
    unknown = read_one(student, teacher, [*ids, 10**6, *ids])
    assert (unknown.places[0][len(ids) - 1 :] == -1).all()


def _folder(tokenizer):
    from pathlib import Path

    return Path(tokenizer.origin).parent


def test_the_prefix_lets_the_first_token_be_told(tokenizers):
    """Where a document begins with a space of the tokenizer's own, the teacher does not see it."""
    student, teacher = tokenizers["pieces"], tokenizers["small bytes"]
    (ids,) = student.encode(["number of tokens"])
    tokens = [student.begin, *ids, student.end]
    reading = read_one(
        student, tokenizers["unigram"], tokens, starts=[True] + [False] * (len(tokens) - 1),
        prefix=(tokenizers["unigram"].begin,),
    )  # fmt: skip
    assert reading.inputs[0] == tokenizers["unigram"].begin
    assert reading.inputs[1] != tokenizers["unigram"].begin, "not twice"
    assert reading.places[0][0] == 0, "the first token behind the beginning"
    apart = read_one(student, teacher, [*ids, student.end], starts=[True] + [False] * len(ids))
    assert teacher.bytes_of(apart.inputs.tolist()).startswith(b"number")


def test_longest_cuts_what_is_read(tokenizers):
    student, teacher = tokenizers["large bytes"], tokenizers["small bytes"]
    (ids,) = student.encode([own.texts()[0][:600]])
    tokens = np.array([ids])
    reader = Reader(student, teacher, longest=64)
    counted = np.ones(tokens.shape, bool)
    cut = reader.read(tokens, np.array([-1]), counted)
    whole = Reader(student, teacher).read(tokens, np.array([-1]), counted)
    assert cut.lengths.max() <= 64 < whole.lengths.max()
    both = cut.places >= 0
    assert both.any()
    assert (cut.places[both] == whole.places[both]).all()
