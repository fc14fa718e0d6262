"""Pairs of answers as a data set: what is written, and the samples that are made of it.

A pair is one document of an indexed data set, of three sequences: the prompt, the chosen answer and
the rejected one (``moe-inject prepare-pairs`` writes them). So the index itself says which tokens
belong to answers and which answers to one pair, and Megatron's files stay as they are.

A sample is the prompt and one of its answers, filled up to the sequence length. Samples 2 k and
2 k + 1 are the chosen and the rejected answer of the k-th pair that is drawn, and the order of the
blend (``scheduled_blend``) puts both into one batch. Where documents are packed, a sample is whole
pairs, as many as fit: each answer, behind a prompt of its own, is a document.

Only an answer's tokens have a label, others have -1. The loss mask leaves nothing out: what divides
a loss by its tokens then counts as many in every sample, so that samples weigh alike on the other
terms.

Shapes: s sequence, m documents.
"""

from __future__ import annotations

import bisect
import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_moe_inject.data.labels import ANSWERS, TOKEN_PLACES
from megatron_moe_inject.data.token_places import WithPlaces
from megatron_moe_inject.host.errors import RecipeError

PARTS = 3
"""Sequences of a pair's document: prompt, chosen, rejected."""
KEY = "objective.preference.data"
_MAKE = "make it with moe-inject prepare-pairs"


class Layout(NamedTuple):
    """How samples are laid out.

    Attributes:
        length: s.
        seed: of the order of the pairs.
        mask: whether samples have an attention mask.
        packed: whether several answers share a sample.
        places: whether samples say where their tokens stand in a file, which answers do not.
    """

    length: int
    seed: int
    mask: bool
    packed: bool
    places: bool = False

    @classmethod
    def of(cls, built: Any) -> Layout:
        """That of a data set of Megatron's, or of a blend of them."""
        config = built.config
        packed = bool(getattr(config, "inter_document_masking", False))
        mask = bool(config.create_attention_mask) and not packed
        places = isinstance(built, WithPlaces)
        return cls(config.sequence_length, config.random_seed, mask, packed, places)


class PairSamples(torch.utils.data.Dataset):
    """Samples of pairs.

    All pairs of a pass over the data come in an order that depends on the seed and the pass alone;
    packs are made once, and their order changes.

    Args:
        files: the indexed data set.
        sequences: numbers of those of the split.
        layout: of the samples.
        entry: its path prefix, for messages.
        samples: how many are asked for, unless packed twice the pairs; ``None`` for one pass.

    Attributes:
        documents: m, answers of the fullest sample, and packed the filling behind them.

    Raises:
        RecipeError: the data set holds something else, no whole pair, or one that is longer than
            a sample.
    """

    def __init__(
        self,
        files: Any,
        sequences: np.ndarray,
        layout: Layout,
        entry: str,
        samples: int | None = None,
    ) -> None:
        self._files = files
        self._layout = layout
        self._pairs = _pairs(files, np.asarray(sequences), entry)
        sizes = np.asarray(files.sequence_lengths, np.int64)
        lengths = sizes.reshape(-1, PARTS)[self._pairs]
        self._check_lengths(lengths, entry)
        self._packs: list[list[int]] | None = None
        if layout.packed:
            self._packs = packs(_packed_lengths(lengths).tolist(), layout.length)
        in_pass = 2 * len(self._pairs) if self._packs is None else len(self._packs)
        self._samples = in_pass if samples is None else samples
        assert layout.packed or self._samples % 2 == 0, samples
        self.documents = 1
        if self._packs is not None:
            self.documents = 2 * max(map(len, self._packs)) + 1
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def in_place_of(cls, built: Any, entry: str, samples: int) -> PairSamples:
        """Samples in the place of what Megatron has built of the files of pairs: a ``GPTDataset``,
        of which only its files, the documents of its split and its settings are used."""
        return cls(built.dataset, np.asarray(built.indices), Layout.of(built), entry, samples)

    def _check_lengths(self, lengths: np.ndarray, entry: str) -> None:
        length = self._layout.length
        together, remedy = "", f"moe-inject prepare-pairs --max-length {length}"
        needed = lengths[:, 0] + lengths[:, 1:].max(1)
        if self._layout.packed:
            together = " with both answers, each behind the prompt, in one pack"
            remedy = f"moe-inject prepare-pairs --max-length {length // 2}"
            needed = _packed_lengths(lengths)
        if (needed > length).any():
            raise RecipeError(
                f"{KEY}: {int((needed > length).sum())} of the {len(needed)} pairs in {entry} are "
                f"longer than --seq-length {length}{together}, the longest has "
                f"{int(needed.max())} tokens; raise it, or leave them out with {remedy}",
                KEY,
            )

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def hashes(self) -> list[str]:
        """A hash of each pair, of its tokens."""
        found = []
        for pair in self._pairs.tolist():
            digest = hashlib.blake2b(digest_size=16)
            for part in range(PARTS):
                ids = np.asarray(self._files.get(pair * PARTS + part), np.int64)
                digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
            found.append(digest.hexdigest())
        return found

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """Also says ``ANSWERS``: of the place of a pair in the data, plus all of them for each pass
        before."""
        turn, answers = self._answers(int(sample))
        length = self._layout.length
        tokens = torch.zeros(length, dtype=torch.int64)
        labels = torch.full((length,), -1)
        borders, numbers = [0], np.full(self.documents, -1)
        for document, (place, rejected) in enumerate(answers):
            first = int(self._pairs[place]) * PARTS
            prompt = self._files.get(first)
            answer = self._files.get(first + 1 + rejected)
            text = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
            begin = borders[-1]
            end = begin + len(text)
            tokens[begin:end] = text
            labels[begin + len(prompt) - 1 : end - 1] = text[len(prompt) :]
            borders.append(end)
            numbers[document] = 2 * (turn * len(self._pairs) + place) + rejected
        made: dict[str, Any] = {"tokens": tokens, "labels": labels}
        if self._layout.mask:
            made["attention_mask"] = torch.ones(length, length).tril().unsqueeze(0) < 0.5
        made |= {"loss_mask": torch.ones(length), "position_ids": torch.arange(length)}
        if self._layout.packed:
            made |= _bordered(borders, length)
        if self._layout.places:
            made[TOKEN_PLACES] = torch.full((length,), -1)
        return {**made, ANSWERS: torch.from_numpy(numbers)}

    def _answers(self, sample: int) -> tuple[int, list[tuple[int, int]]]:
        """The pass that a sample is of, and its answers: the place of the pair, and whether it is
        the rejected one."""
        if self._packs is None:
            number, rejected = divmod(sample, 2)
            turn, place = divmod(number, len(self._pairs))
            return turn, [(int(self._shuffled(turn, len(self._pairs))[place]), rejected)]
        turn, place = divmod(sample, len(self._packs))
        pack = self._packs[int(self._shuffled(turn, len(self._packs))[place])]
        return turn, [(pair, rejected) for pair in pack for rejected in (0, 1)]

    def _shuffled(self, turn: int, count: int) -> np.ndarray:
        """Places in the order of a pass over them."""
        if self._order is None or self._order[0] != turn:
            rng = np.random.default_rng([self._layout.seed, turn])
            self._order = turn, rng.permutation(count)
        return self._order[1]


def packs(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which lengths share a pack of ``capacity``, by place: the longest first, each into the
    fullest pack that has room (best fit decreasing), at most 11/9 of the fewest possible and 1."""
    made: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each pack, by rising room
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[place], -1))
        if at == len(room):
            left, number = capacity, len(made)
            made.append([])
        else:
            left, number = room.pop(at)
        made[number].append(place)
        bisect.insort(room, (left - lengths[place], number))
    return made


def _packed_lengths(lengths: np.ndarray) -> np.ndarray:
    """Tokens of pairs in a pack, of those of their parts ``[k, 3]``: each answer has its prompt."""
    return 2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]


def _bordered(borders: list[int], length: int) -> dict[str, torch.Tensor]:
    """What Megatron's loader says of documents in a pack; what fills it up is one of them."""
    ends = borders if borders[-1] == length else [*borders, length]
    sizes = np.diff(ends)
    cu_seqlens = torch.full((length + 1,), length, dtype=torch.int32)
    cu_seqlens[: len(ends)] = torch.tensor(ends, dtype=torch.int32)
    positions = torch.cat([torch.arange(int(size)) for size in sizes])
    longest = torch.tensor(int(sizes.max()), dtype=torch.int32)
    return {"position_ids": positions, "cu_seqlens": cu_seqlens, "max_seqlen": longest}


def _pairs(files: Any, sequences: np.ndarray, entry: str) -> np.ndarray:
    """Numbers of the pairs whose three sequences are all among those of a split."""
    total = len(files.sequence_lengths)
    borders = np.asarray(files.document_indices)
    if total % PARTS or not np.array_equal(borders, np.arange(0, total + 1, PARTS)):
        raise RecipeError(
            f"{KEY}: {entry} holds no pairs: its documents are not of {PARTS} parts; {_MAKE}", KEY
        )
    there = np.zeros(total, bool)
    there[sequences] = True
    pairs = np.flatnonzero(there.reshape(-1, PARTS).all(1))
    if not len(pairs):
        raise RecipeError(
            f"{KEY}: {entry} has no whole pair in its split; {_MAKE}, or give it more by --split",
            KEY,
        )
    return pairs
