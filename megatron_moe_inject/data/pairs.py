"""Pairs of answers as a data set: what is written, and the samples that are made of it.

A pair is one document of an indexed data set, of three sequences: the prompt, the chosen answer and
the rejected one (``moe-inject prepare-pairs`` writes them). So the index itself says which tokens
belong to answers and which answers to one pair, and Megatron's files stay as they are. A sample is
the prompt and one of its answers, filled up to the sequence length. Only the answer's tokens have a
label, others have -1. The loss mask leaves nothing out: what divides a loss by its tokens then
counts as many in every sample, so that answers of any length weigh alike on the other terms.
Samples 2 k and 2 k + 1 are the chosen and the rejected answer of the k-th pair that is drawn. The
order of the blend (``scheduled_blend``) puts both into one batch.

Shapes: s sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_moe_inject.data.labels import TOKEN_PLACES
from megatron_moe_inject.data.token_places import WithPlaces
from megatron_moe_inject.host.errors import RecipeError

PARTS = 3
"""Sequences of a pair's document: prompt, chosen, rejected."""
_MAKE = "make it with moe-inject prepare-pairs"


class PairSamples(torch.utils.data.Dataset):
    """Samples of pairs in the place of what Megatron has built of their files.

    All pairs of a pass over the data come in an order that depends on the seed and the pass alone.

    Args:
        built: Megatron's ``GPTDataset`` of the entry, of which only its files, the documents of
            its split and its settings are used.
        entry: its path prefix, for messages.
        samples: how many are asked for, twice the pairs.

    Raises:
        RecipeError: the data set holds something else, no whole pair, or one that is longer than
            the sequence.
    """

    def __init__(self, built: Any, entry: str, samples: int) -> None:
        assert samples % 2 == 0, samples
        self._places = isinstance(built, WithPlaces)
        self._samples = samples
        self._files = built.dataset
        self._config = built.config
        self._pairs = _pairs(self._files, np.asarray(built.indices), entry)
        length = self._config.sequence_length
        sizes = np.asarray(self._files.sequence_lengths, np.int64)
        first = self._pairs * PARTS
        longest = sizes[first] + np.maximum(sizes[first + 1], sizes[first + 2])
        if (longest > length).any():
            raise RecipeError(
                f"objective.preference.data: {int((longest > length).sum())} of the "
                f"{len(longest)} pairs in {entry} are longer than --seq-length {length}, the "
                f"longest has {int(longest.max())} tokens; raise it, or leave them out with "
                f"moe-inject prepare-pairs --max-length {length}",
                "objective.preference.data",
            )
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        number, rejected = divmod(int(sample), 2)
        turn, place = divmod(number, len(self._pairs))
        first = int(self._shuffled(turn)[place]) * PARTS
        prompt = self._files.get(first)
        text = np.concatenate([prompt, self._files.get(first + 1 + rejected)]).astype(np.int64)
        length = self._config.sequence_length
        tokens = torch.zeros(length, dtype=torch.int64)
        labels = torch.full((length,), -1)
        tokens[: len(text)] = torch.from_numpy(text)
        labels[len(prompt) - 1 : len(text) - 1] = tokens[len(prompt) : len(text)]
        made: dict[str, Any] = {"tokens": tokens, "labels": labels}
        if self._config.create_attention_mask:
            made["attention_mask"] = torch.ones(length, length).tril().unsqueeze(0) < 0.5
        made |= {"loss_mask": torch.ones(length), "position_ids": torch.arange(length)}
        return {**made, TOKEN_PLACES: torch.full((length,), -1)} if self._places else made

    def _shuffled(self, turn: int) -> np.ndarray:
        """The pairs in the order of a pass over them."""
        if self._order is None or self._order[0] != turn:
            rng = np.random.default_rng([self._config.random_seed, turn])
            self._order = turn, rng.permutation(self._pairs)
        return self._order[1]


def _pairs(files: Any, sequences: np.ndarray, entry: str) -> np.ndarray:
    """Numbers of the pairs whose three sequences are all among those of a split."""
    total = len(files.sequence_lengths)
    borders = np.asarray(files.document_indices)
    if total % PARTS or not np.array_equal(borders, np.arange(0, total + 1, PARTS)):
        raise RecipeError(
            f"objective.preference.data: {entry} holds no pairs: its documents are not of "
            f"{PARTS} parts; {_MAKE}",
            "objective.preference.data",
        )
    there = np.zeros(total, bool)
    there[sequences] = True
    pairs = np.flatnonzero(there.reshape(-1, PARTS).all(1))
    if not len(pairs):
        raise RecipeError(
            f"objective.preference.data: {entry} has no whole pair in the training split; {_MAKE}, "
            "or give training more of it by --split",
            "objective.preference.data",
        )
    return pairs
