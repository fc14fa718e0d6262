"""Which micro-batches training will read next, before it reads them.

Megatron's samplers say in which order a data set is read, and keep no state that a second reading
of the same order would disturb. So a second one runs some steps ahead of the data loader, over the
same data set in the training process: over blends, shuffled or by schedule, as over any other.
Nothing is taken from the loader itself, so reruns, evaluations and resumes find it as it is without
this.

What was foreseen is compared with what then comes. Where they differ (iterations that are skipped,
batches that a rerun reads again), the foreseen micro-batches up to the one that came are let go, or
none is, if it is not among them; a text that was not foreseen is asked for when it is needed.
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_moe_inject.host.step import MicroBatch

_KEYS = ("tokens", "labels", "dataset_id", "cu_seqlens")

Texts = Mapping[str, Sequence[np.ndarray]]
"""By teacher, the texts of a micro-batch."""


class _Foreseen(NamedTuple):
    """A micro-batch that will come."""

    digest: bytes
    texts: Texts


class Ahead:
    """Foresees the training data of this rank.

    Args:
        texts_of: the texts that a micro-batch asks for, by teacher.
        hint, forget: are given texts by teacher that will be needed, or will not.
        masked: whether ``texts_of`` asks which labels count.
    """

    def __init__(
        self,
        texts_of: Callable[[MicroBatch], Texts],
        hint: Callable[[Texts], None],
        forget: Callable[[Texts], None],
        masked: bool = False,
    ) -> None:
        self._keys = (*_KEYS, "loss_mask") if masked else _KEYS
        self._texts_of, self._hint, self._forget = texts_of, hint, forget
        self._order: Iterator[MicroBatch] | None = None
        self._coming: deque[_Foreseen] = deque()

    def follow(self, loader: Any, cyclic: bool) -> bool:
        """Foresee what a data loader of Megatron's will give; whether its order can be known.

        Args:
            loader: with a batch sampler over a data set.
            cyclic: it is read again from its beginning when it ends.
        """
        sampler = getattr(loader, "batch_sampler", None)
        dataset = getattr(loader, "dataset", None)
        if sampler is None or dataset is None:
            return False
        self._order = _read(dataset, copy.copy(sampler), cyclic, self._keys)
        return True

    @property
    def any(self) -> bool:
        """Whether something is foreseen now."""
        return bool(self._coming)

    @property
    def follows(self) -> bool:
        """Whether it foresees anything."""
        return self._order is not None

    def reach(self, micro_batches: int) -> None:
        """Foresee so many micro-batches from here on, and hint at what they ask for."""
        while self._order is not None and len(self._coming) < micro_batches:
            batch = next(self._order, None)
            if batch is None:
                return
            texts = self._texts_of(batch)
            self._coming.append(_Foreseen(_digest(batch), texts))
            self._hint(texts)

    def came(self, batches: Sequence[MicroBatch]) -> None:
        """These micro-batches are read by a training step."""
        for batch in batches:
            digest = _digest(batch)
            places = [n for n, foreseen in enumerate(self._coming) if foreseen.digest == digest]
            if not places:
                continue
            for _ in range(places[0]):
                self._forget(self._coming.popleft().texts)
            self._coming.popleft()


def _read(dataset: Any, sampler: Any, cyclic: bool, keys: Sequence[str]) -> Iterator[MicroBatch]:
    while True:
        for indices in sampler:
            samples = [dataset[index] for index in indices]
            yield {
                key: torch.utils.data.default_collate([sample[key] for sample in samples])
                for key in keys
                if key in samples[0]
            }
        if not cyclic:
            return


def _digest(batch: MicroBatch) -> bytes:
    tokens = torch.as_tensor(batch["tokens"]).cpu().long().contiguous()
    return hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).digest()
