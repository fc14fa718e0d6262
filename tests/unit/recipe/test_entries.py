"""Entries of blends: the class of a prefix that stands twice, and splits that leave nothing."""

import pytest

from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.recipe.entries import _check_documents, _documents, split_labels
from tests.harness.corpus import write_corpora
from tests.harness.recipes import facts, message_of, two_domains


def test_a_prefix_that_training_has_in_two_classes():
    """Its held-out text belongs to the class of its position, or the user has to say."""
    train = ["/a", "/a", "/b"]

    def labels(valid):
        found = facts(train, data_paths={"valid": tuple(valid), "test": None})
        return split_labels(two_domains([1], [2]), found, "valid")

    assert labels(train) == [GENERAL, 0, 1]
    assert labels(["/a", "/a", "/v_b"]) == [GENERAL, 0, 1]
    assert labels(["/v_a", "/a", "/b"]) == [GENERAL, 0, 1]
    for valid in (["/a"], ["/a", "/b"], ["/a", "/b", "/a"], ["/b", "/a", "/a"]):
        message = message_of(lambda valid=valid: labels(valid))
        assert message.startswith("--valid-data-path: '/a' cannot be matched to a domain")
        assert "in several classes" in message
    same = facts(["/a", "/a", "/b"], data_paths={"valid": ("/a",), "test": None})
    assert split_labels(two_domains(["/a"], [2]), same, "valid") == [0]


def test_a_split_that_leaves_no_document(tmp_path):
    paths = write_corpora(tmp_path, documents=12, length=5)
    assert [_documents(path) for path in paths] == [12, 12]
    for split in ("90,5,5", "969, 30, 1", "97,0,3"):
        with pytest.raises(RecipeError, match=r"--split: .* of 12 documents, none for"):
            _check_documents(split, paths)
    for split in ("80,10,10", "1,0,0", "90,10"):
        _check_documents(split, paths)
    (tmp_path / "other.idx").write_bytes(b"something else of some length")
    _check_documents("969, 30, 1", [str(tmp_path / "other"), str(tmp_path / "missing")])
