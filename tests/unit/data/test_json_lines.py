"""JSON Lines files: every line's text, or one error that names the line."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.data.json_lines import check_inputs, is_compressed, read_lines
from megatron_moe_inject.host.errors import RecipeError

TEXTS = ["one", "zwei\nZeilen", "", "3 \u2028 µ 🙂"]


def _texts(*paths, field="text"):
    return [text for lines in read_lines(paths) for _, text in lines.texts(field)]


def _content(texts, ascii_only=True):
    return "".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) + "\n"
        for i, text in enumerate(texts)
    ).encode()


@settings(max_examples=30)
@given(st.lists(st.text()), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n \n"]))
def test_texts_come_back(tmp_path_factory, texts, ascii_only, end):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    path.write_bytes(_content(texts, ascii_only).replace(b"\n", end.encode()))
    assert _texts(path) == texts
    path.write_bytes(_content(texts).rstrip(b"\n"))
    assert _texts(path) == texts, "without an end of the last line"


def test_files_follow_each_other_compressed_or_not(tmp_path):
    paths = []
    for name, write in (
        ("a.jsonl", lambda p, c: p.write_bytes(c)),
        ("b.jsonl.gz", lambda p, c: p.write_bytes(gzip.compress(c[:60]) + gzip.compress(c[60:]))),
        ("c.json.bz2", lambda p, c: p.write_bytes(bz2.compress(c))),
        ("d.jsonl.xz", lambda p, c: p.write_bytes(lzma.compress(c))),
        ("e.jsonl", lambda p, c: p.write_bytes(b"\xef\xbb\xbf" + c)),
    ):
        paths.append(tmp_path / name)
        write(paths[-1], _content([f"{name} {text}" for text in TEXTS]))
    check_inputs(paths)
    assert _texts(*paths) == [f"{path.name} {text}" for path in paths for text in TEXTS]
    assert [is_compressed(path) for path in paths] == [False, True, True, True, False]


def test_chunks_are_bounded_and_know_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_content(["x" * 100_000] * 30))
    chunks = list(read_lines([path]))
    assert len(chunks) > 2
    assert all(sum(map(len, chunk.lines)) < 1.2e6 for chunk in chunks)
    numbers = [number for chunk in chunks for number, _ in chunk.texts("text")]
    assert numbers == list(range(1, 31))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "line 3 is no JSON (Expecting ',' delimiter"),
        (b"[1]", "line 3 is [1] and no object; correct it"),
        (b'"text"', "line 3 is 'text' and no object"),
        (
            b'{"body": "a", "id": 1}',
            "has no 'text'; name one of its keys with --field: 'body', 'id'",
        ),
        (b'{"text": ["a"]}', "has ['a'] under 'text'; --field needs text"),
        (b'{"text": null}', "has None under 'text'"),
        (b'{"text": "\\ud800"}', "with half a character (a lone surrogate)"),
        (b'{"text": "\xff"}', "line 3 is no JSON ('utf-8' codec"),
        (b'{"text": ' + b"[" * 100_000, "line 3 is no JSON"),
    ],
)
def test_a_line_that_cannot_be_read(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_content(["one", "two"]) + line + b"\n" + _content(["four"]))
    with pytest.raises(RecipeError) as caught:
        _texts(path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"--input: '{path}' line 3 ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cut", [5, -4])
@pytest.mark.parametrize("name", ["a.gz", "a.bz2", "a.xz"])
def test_compressed_files_that_are_damaged(tmp_path, name, cut):
    path = tmp_path / name
    pack = {"a.gz": gzip, "a.bz2": bz2, "a.xz": lzma}[name].compress
    path.write_bytes(pack(_content(["text"] * 10))[:cut])
    with pytest.raises(
        RecipeError, match=rf"{name}' cannot be read beyond line \d+ \(.*whole file"
    ):
        _texts(path)
    path.write_bytes(_content(["text"]))
    with pytest.raises(RecipeError, match=r"cannot be read beyond line 0"):
        _texts(path)


def test_inputs_that_are_no_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path, problem in (
        (tmp_path, "is a folder; name files"),
        (tmp_path / "none.jsonl", "is not there"),
        (tmp_path / "a.parquet", "unpack or convert it to .jsonl"),
    ):
        with pytest.raises(RecipeError, match=f"--input: .* {problem}"):
            check_inputs([path])
