"""Rollouts as samples of Megatron's: what stands in a batch in the place of text of the corpus.

A rollout of p + c ids is p + c - 1 tokens with the label behind each, of which those count whose
label is a token of the completion that is to be learned from. One that is longer than a sample is
cut at its end. Where documents are packed, rollouts of one file stand behind each other in a
sample, each a document of its own; else a sample has one. What is left of a sample is filled up
with tokens that do not count.

Shapes: s sequence, p and c of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.rollouts.file_format import Rollout


def samples_of_file(
    rollouts: Sequence[Rollout], sequence_length: int, *, packed: bool
) -> list[list[int]]:
    """Which rollouts of a file each of its samples holds, in the order of the file.

    Those of which no token would count (a prompt as long as a sample, a mask of zeros) are left
    out.
    """
    samples: list[list[int]] = []
    room = 0
    for number, rollout in enumerate(rollouts):
        length = min(len(rollout.prompt) + len(rollout.completion) - 1, sequence_length)
        learned = length + 1 - len(rollout.prompt)
        if learned <= 0 or not rollout.mask[:learned].any():
            continue
        if packed and samples and length <= room:
            samples[-1].append(number)
            room -= length
        else:
            samples.append([number])
            room = sequence_length - length
    return samples


def put(batch: MicroBatch, place: int, rollouts: Sequence[Rollout], *, packed: bool) -> None:
    """Put rollouts in the place of one sample of a micro-batch.

    Args:
        batch: of Megatron, ``tokens``, ``labels`` and ``loss_mask`` ``[b, s]`` and, packed,
            ``position_ids`` and ``cu_seqlens`` too. Its tensors are changed in place.
        place: of the sample, 0 to b - 1.
    """
    length = batch["tokens"].shape[1]
    tokens, labels = np.zeros(length, np.int64), np.zeros(length, np.int64)
    mask, borders = np.zeros(length, np.float32), [0]
    for rollout in rollouts:
        ids = np.concatenate([rollout.prompt, rollout.completion])[: length + 1]
        begin, end = borders[-1], borders[-1] + len(ids) - 1
        tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
        first = begin + len(rollout.prompt) - 1
        mask[first:end] = rollout.mask[: end - first]
        borders.append(end)
    for name, values in (("tokens", tokens), ("labels", labels), ("loss_mask", mask)):
        batch[name][place] = torch.from_numpy(values).to(batch[name].dtype)
    if packed:
        _put_borders(batch, place, borders, length)


def _put_borders(batch: MicroBatch, place: int, borders: list[int], length: int) -> None:
    if borders[-1] < length:
        borders = [*borders, length]
    lengths = np.diff(borders)
    positions = np.concatenate([np.arange(n) for n in lengths])
    batch["position_ids"][place] = torch.from_numpy(positions)
    batch["cu_seqlens"][place] = length
    batch["cu_seqlens"][place, : len(borders)] = torch.tensor(borders, dtype=torch.int32)
    batch["max_seqlen"][place] = int(lengths.max())
