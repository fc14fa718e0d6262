"""Which rows of the vocabulary a domain's text asks for."""

import numpy as np
import pytest

from megatron_moe_inject.adapters import contrast
from megatron_moe_inject.host.errors import RecipeError


def dataset(path, documents):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int32), [len(document)])
    builder.finalize(f"{path}.idx")
    return str(path)


def test_ids_are_counted_in_the_training_part(tmp_path):
    first = dataset(tmp_path / "a", [[1, 1, 2], [3], [9, 9], [9]])
    second = dataset(tmp_path / "b", [[1], [0]])
    assert contrast.count_ids([first, second], 5).tolist() == [1, 3, 1, 1, 0]
    assert contrast.count_ids([first, second], 5, share=0.5).tolist() == [0, 3, 1, 1, 0]


def test_what_is_counted_at_once_changes_nothing(tmp_path, monkeypatch):
    prefix = dataset(tmp_path / "a", [[i % 7] * (i % 5 + 1) for i in range(50)])
    whole = contrast.count_ids([prefix], 7)
    monkeypatch.setattr(contrast, "_AT_ONCE", 3)
    assert contrast.count_ids([prefix], 7).tolist() == whole.tolist()
    assert whole.sum() == 150


def test_large_text_is_counted_in_part(tmp_path, monkeypatch):
    prefix = dataset(tmp_path / "a", [[i % 2] * 10 for i in range(100)])
    monkeypatch.setattr(contrast, "MOST_TOKENS", 300)
    assert contrast.count_ids([prefix], 2).sum() == 250


def test_the_contrast_is_the_part_of_the_divergence():
    domain, general = np.array([90, 9, 1, 0]), np.array([10, 60, 20, 10])
    scores = contrast.contrast(domain, general)
    p, q = (domain + 0.5) / 102, (general + 0.5) / 102
    assert scores[:3] == pytest.approx((p * np.log(p / q))[:3])
    assert scores[3] == -np.inf
    assert contrast.chosen(scores, budget=1.0, threshold=None) == [0]


def test_budget_and_threshold():
    scores = np.array([0.1, -0.2, 0.5, 0.3, 0.0, 0.1])
    assert contrast.chosen(scores, budget=0.5, threshold=None) == [0, 2, 3]
    assert contrast.chosen(scores, budget=0.34, threshold=None) == [2, 3]
    assert contrast.chosen(scores, budget=None, threshold=0.8) == [2, 3]
    assert contrast.chosen(scores, budget=None, threshold=0.81) == [0, 2, 3]
    assert contrast.chosen(scores, budget=None, threshold=1.0) == [0, 2, 3, 5]
    with pytest.raises(RecipeError, match="none is chosen"):
        contrast.chosen(scores, budget=0.1, threshold=None)
    with pytest.raises(RecipeError, match="none is chosen"):
        contrast.chosen(-abs(scores), budget=None, threshold=0.5)
