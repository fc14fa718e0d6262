"""Rollouts as samples: tokens, labels, what counts, and packs."""

import numpy as np
import torch

from megatron_moe_inject.rollouts.file_format import Rollout
from megatron_moe_inject.rollouts.lanes import Lanes
from megatron_moe_inject.rollouts.samples import put, samples_of_file


def rollout(prompt, completion, mask=None):
    mask = [1] * len(completion) if mask is None else mask
    return Rollout(np.array(prompt), np.array(completion), np.array(mask, bool))


def batch(samples, length, packed=False):
    made = {
        "tokens": torch.full((samples, length), 9),
        "labels": torch.full((samples, length), 9),
        "loss_mask": torch.ones(samples, length),
        "position_ids": torch.arange(length).repeat(samples, 1),
    }
    if packed:
        made["cu_seqlens"] = torch.full((samples, length + 1), length, dtype=torch.int32)
        made["max_seqlen"] = torch.full((samples,), length, dtype=torch.int32)
    return made


def test_only_tokens_of_the_completion_count():
    made = batch(2, 8)
    put(made, 1, [rollout([1, 2, 3], [4, 5, 6], [1, 0, 1])], packed=False)
    assert made["tokens"][1].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert made["labels"][1].tolist() == [2, 3, 4, 5, 6, 0, 0, 0]
    assert made["loss_mask"][1].tolist() == [0, 0, 1, 0, 1, 0, 0, 0]
    assert made["tokens"][0].tolist() == [9] * 8
    assert made["loss_mask"][0].tolist() == [1] * 8


def test_a_longer_rollout_is_cut_at_its_end():
    made = batch(1, 4)
    put(made, 0, [rollout([1, 2], [3, 4, 5, 6])], packed=False)
    assert made["tokens"][0].tolist() == [1, 2, 3, 4]
    assert made["labels"][0].tolist() == [2, 3, 4, 5]
    assert made["loss_mask"][0].tolist() == [0, 1, 1, 1]


def test_a_pack_has_a_document_for_each_and_one_for_the_rest():
    made = batch(1, 9, packed=True)
    put(made, 0, [rollout([1, 2], [3]), rollout([4], [5, 6, 7])], packed=True)
    assert made["tokens"][0].tolist() == [1, 2, 4, 5, 6, 0, 0, 0, 0]
    assert made["labels"][0].tolist() == [2, 3, 5, 6, 7, 0, 0, 0, 0]
    assert made["loss_mask"][0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert made["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert made["cu_seqlens"][0].tolist() == [0, 2, 5, 9, 9, 9, 9, 9, 9, 9]
    assert made["max_seqlen"].tolist() == [4]


def test_a_full_pack_has_no_rest():
    made = batch(1, 5, packed=True)
    put(made, 0, [rollout([1, 2], [3]), rollout([4], [5, 6, 7])], packed=True)
    assert made["cu_seqlens"][0].tolist() == [0, 2, 5, 5, 5, 5]


def test_what_cannot_be_learned_from_is_left_out():
    rollouts = [
        rollout([1], [2]),
        rollout([1] * 9, [2]),
        rollout([1], [2, 3], [0, 0]),
        rollout([1] * 7, [2, 3, 4], [0, 0, 1]),  # cut behind its second token
        rollout([1] * 8, [2, 3]),
    ]
    assert samples_of_file(rollouts, 8, packed=False) == [[0], [4]]


def test_packs_are_filled_in_order():
    rollouts = [rollout([1], [2] * n) for n in (3, 4, 2, 9, 1)]
    assert samples_of_file(rollouts, 8, packed=True) == [[0, 1], [2], [3], [4]]
    assert samples_of_file(rollouts, 8, packed=False) == [[0], [1], [2], [3], [4]]


def test_the_order_of_a_batch_does_not_depend_on_its_ranks():
    """Eight samples in micro-batches of two, as Megatron deals them to one rank and to two."""
    labels = torch.tensor([0, -1, 0, 0, -1, 0, 0, -1])
    numbers = torch.arange(8)

    def dealt(values, ranks):
        return values.view(4 // ranks, ranks, 2).transpose(0, 1)

    orders = []
    for ranks in (1, 2, 4):
        lanes = Lanes(None, ranks, 0, spread=False)
        places = lanes.ordered(dealt(labels, ranks), 0)
        orders.append([int(dealt(numbers, ranks)[place]) for place in places])
    assert orders[0] == orders[1] == orders[2] == [0, 2, 3, 5, 6]
