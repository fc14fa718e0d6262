"""Domain labels: pulling micro-batches once, mapping dataset ids, hiding them from stock code."""

import pytest
import torch

from megatron_moe_inject.data.labels import HostGroup, domains_of, for_stock_code, pull
from megatron_moe_inject.host.labels import (
    GENERAL,
)


def batches(*ids):
    return [{"tokens": torch.zeros(2, 4), "dataset_id": torch.tensor(row)} for row in ids]


def test_pull_takes_exactly_the_steps_micro_batches():
    iterator = iter(batches([0, 1], [1, 1], [2, 0]))
    assert len(pull(iterator, 2)) == 2
    assert next(iterator)["dataset_id"].tolist() == [2, 0]
    assert pull(None, 2) is None


def test_dataset_ids_become_domains():
    labels = domains_of(batches([0, 1], [2, 0]), [GENERAL, 1, 0], 2)
    assert labels.tolist() == [[GENERAL, 1], [0, GENERAL]]


def test_a_blend_of_one_dataset_is_one_domain():
    plain = [{"tokens": torch.zeros(3, 4)} for _ in range(2)]
    assert domains_of(plain, [0], 3).tolist() == [[0, 0, 0]] * 2
    with pytest.raises(AssertionError, match="dataset_id"):
        domains_of(plain, [0, 1], 3)


def test_stock_code_does_not_see_the_id_and_a_rerun_still_does():
    original = batches([0, 1])
    clean = for_stock_code(original)
    assert set(clean[0]) == {"tokens"}
    assert "dataset_id" in original[0]
    assert for_stock_code(None) is None


def test_one_rank_needs_no_group():
    labels = torch.tensor([[0, GENERAL]])
    assert HostGroup(None, 0).broadcast_labels(labels, 1, 2) is labels
    bits = torch.rand(2, 3, 5) > 0.5
    assert HostGroup(None, 0).broadcast_bits(bits, (2, 3, 5)) is bits
