"""Evaluations as files: read back as written, refused when anything is wrong with them."""

import json
import os

import numpy as np
import pytest

from megatron_moe_inject.evaluation.evaluation_file import (
    append_line,
    read_evaluation,
    read_list,
    write_evaluation,
    write_list,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from tests.harness.evaluations import evaluation, with_pairs


def both(**changed):
    return evaluation({"teacher": 1.0, "length": 100}, {"original": 0.01, "length": 90}, **changed)


def assert_equal(a, b):
    assert a.provenance == b.provenance
    assert a.text() == b.text()
    assert a.classes.keys() == b.classes.keys()
    for name, found in a.classes.items():
        other = b.classes[name]
        assert (found.sequences, found.teacher, found.data) == (
            other.sequences,
            other.teacher,
            other.data,
        )
        assert found.sums.keys() == other.sums.keys()
        assert all(np.array_equal(v, other.sums[k]) for k, v in found.sums.items())
        assert np.array_equal(found.bins, other.bins)
        assert found.summary() == other.summary()


def test_it_reads_back_what_was_written(tmp_path):
    path = tmp_path / "e.json"
    checksum = write_evaluation(path, both())
    assert_equal(read_evaluation(path), both())
    plain = json.loads(path.read_text())
    assert plain["sha256"] == checksum
    summary = plain["classes"]["code"]["summary"]
    assert summary["calibration_error"] == pytest.approx(0.25)
    assert summary["teacher_loss"] < summary["loss"]
    assert plain["classes"]["general"]["summary"]["original_kl"] == pytest.approx(0.01)


def test_pairs_read_back_as_they_were_written(tmp_path):
    for against in (None, "original"):
        found = with_pairs(both(), against=against)
        path = tmp_path / "e.json"
        write_evaluation(path, found)
        again = read_evaluation(path)
        assert_equal(again, found)
        assert again.text() != both().text()
        assert again.pairs.hashes == found.pairs.hashes == tuple(sorted(found.pairs.hashes))
        assert again.pairs.sums() == found.pairs.sums()
        assert (again.pairs.against, again.pairs.spec) == (against, found.pairs.spec)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("sums", "log_prob_chosen", 0), 1.0, "is no log-probability"),
        (("sums", "tokens_rejected", 0), 0, "is no count"),
        (("sums", "log_prob_chosen"), [-1.0], "has 1 entries for 3 pairs"),
        (("pairs", 0), "z" * 32, "is not sorted"),
        (("loss", "beta"), -1.0, "must be positive"),
        (("summary", "margin"), 9.0, "sha256: does not fit"),
        (("reference",), None, "reference_log_prob_chosen"),
    ],
)
def test_pairs_that_were_changed_are_refused(tmp_path, keys, value, message):
    path = tmp_path / "e.json"
    write_evaluation(path, with_pairs(both()))
    plain = json.loads(path.read_text())
    *inner, last = keys
    place = plain["pairs"]
    for key in inner:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(plain))
    with pytest.raises(RecipeError, match=message):
        read_evaluation(path)


def test_layout_of_the_file_does_not_matter(tmp_path):
    path = tmp_path / "e.json"
    write_evaluation(path, both())
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert_equal(read_evaluation(path), both())


def change(plain, *keys, value):
    for key in keys[:-1]:
        plain = plain[key]
    plain[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("classes", "code", "sums", "loss", 3), 1.5, "sha256: does not fit"),
        (("classes", "code", "summary", "loss"), 1.5, "sha256: does not fit"),
        (("provenance", "iteration"), 7, "sha256: does not fit"),
        (("provenance", "iteration"), "7", "provenance.iteration: '7' is not an integer"),
        (("version",), 2, "version: 2 is not known here"),
        (("format",), "else", "is no evaluation"),
        (("sha256",), "0", "sha256: does not fit"),
        (("extra",), 1, "extra: is not known in this version"),
        (("classes", "code", "sums", "luck"), [1.0] * 20, "sums.luck: is not known"),
        (("classes", "code", "sums", "loss"), [1.0], "has 1 entries for 20 sequences"),
        (("classes", "code", "sums", "loss", 0), float("nan"), "is not finite"),
        (("classes", "code", "sequences", 0), "f" * 32, "sequences: is not sorted"),
        (("classes", "code", "calibration"), [[1.0]], "is not three rows of 15"),
    ],
)
def test_what_was_changed_is_refused(tmp_path, keys, value, message):
    path = tmp_path / "e.json"
    write_evaluation(path, both())
    plain = json.loads(path.read_text())
    change(plain, *keys, value=value)
    path.write_text(json.dumps(plain))
    with pytest.raises(RecipeError) as error:
        read_evaluation(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_summary_that_was_changed_with_its_checksum_is_refused(tmp_path, monkeypatch):
    from megatron_moe_inject.evaluation import evaluation_file

    path, content = tmp_path / "e.json", evaluation_file._content

    def wrong(found):
        plain = content(found)
        plain["classes"]["code"]["summary"]["loss"] = 0.1
        return plain

    monkeypatch.setattr(evaluation_file, "_content", wrong)
    write_evaluation(path, both())
    with pytest.raises(RecipeError, match=r"summary\.loss: does not follow from the sums"):
        read_evaluation(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"format": 3}'])
def test_what_is_no_evaluation(tmp_path, text):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(RecipeError):
        read_evaluation(path)


def test_a_loss_that_is_not_finite_is_not_written(tmp_path):
    path = tmp_path / "e.json"
    with pytest.raises(RecipeError, match="not finite"):
        write_evaluation(path, evaluation({"loss": float("inf")}))
    assert not path.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "e.json"
    write_evaluation(path, both())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RecipeError, match="No space left"):
        write_evaluation(path, both(iteration=9))
    assert_equal(read_evaluation(path), both())
    assert os.listdir(tmp_path) == ["e.json"]


def test_a_list_grows_by_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    assert read_list(path) == []
    for iteration in (0, 2, 4):
        append_line(path, both(iteration=iteration))
        assert path.read_text().endswith("\n")
    assert [e.provenance.iteration for e in read_list(path)] == [0, 2, 4]
    assert read_evaluation(path).provenance.iteration == 4
    assert read_evaluation(path, last=False).provenance.iteration == 0
    write_list(path, read_list(path)[:2])
    assert [e.provenance.iteration for e in read_list(path)] == [0, 2]


def test_the_beginning_of_a_line_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    append_line(path, both())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(read_list(path)) == 1
    path.write_bytes(whole[:-1])
    assert read_list(path) == []
    with pytest.raises(RecipeError, match="no evaluation yet"):
        read_evaluation(path)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    write_list(path, [both(), both(iteration=2)])
    path.write_bytes(path.read_bytes().replace(b'"iteration":2', b'"iteration":3'))
    with pytest.raises(RecipeError, match=r"run\.jsonl, line 2: sha256: does not fit"):
        read_list(path)


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    append_line(path, both())
    before, write = path.read_bytes(), os.write

    def half(handle, data):
        if len(data) < 1000:
            raise OSError(28, "No space left on device")
        return write(handle, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RecipeError, match="No space left"):
        append_line(path, both(iteration=2))
    assert path.read_bytes() == before
