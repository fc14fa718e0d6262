"""The same held-out text in every evaluation of a run.

Megatron's validation iterator moves on from one evaluation to the next, and how far depends on
where a run was resumed. Here it starts from the beginning each time: the loader is built anew over
the same validation set, from sample 0. So nothing has to be kept in memory between evaluations, a
resumed run needs no memory of earlier ones, and Megatron's own validation loss becomes a curve over
one text. The price is that evaluations see no more than ``--eval-iters`` batches in all.

Only that many samples are asked of the data provider, because what Megatron's datasets put first
can depend on how many are asked for. So the text follows from the data flags alone: a run that
only evaluates (``--skip-train``) asks for as many and reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class HeldOutIterator:
    """Reads a data loader from its beginning whenever it was restarted.

    Args:
        load: gives a new data loader.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._iterator: Iterator | None = None

    def restart(self) -> None:
        """Go back to the beginning."""
        self._iterator = None

    def __iter__(self) -> HeldOutIterator:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            state = torch.get_rng_state()  # a torch loader draws a seed for its workers
            self._iterator = iter(self._load())
            torch.set_rng_state(state)
        return next(self._iterator)


class HeldOutText:
    """Stands where Megatron builds its validation data.

    Args:
        samples: how many samples an evaluation reads.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._valid: Any = None
        self._iterators: dict[int, HeldOutIterator] = {}

    def num_samples(self, asked: Sequence[int | None]) -> tuple:
        """Numbers of samples for training, validation and test."""
        train, _, test = asked
        return train, self.samples, test

    def datasets(self, built: Sequence[Any]) -> Any:
        """Notice the validation set among the datasets that were built."""
        self._valid = built[1]
        return built

    def loader(self, build: Callable[[Any, int], Any], dataset: Any, consumed: int) -> Any:
        """A data loader, over the validation set always from the beginning."""
        if dataset is None or dataset is not self._valid:
            return build(dataset, consumed)
        return build(dataset, 0)

    def iterators(self, build: Callable[[Any, int], Any], built: Sequence[Any]) -> tuple:
        """Training, validation and test iterators, the second one of ours."""
        train, valid, test = built
        if valid is not None:
            dataset = self._valid
            valid = HeldOutIterator(lambda: build(dataset, 0))
            self._iterators[id(valid)] = valid
        return train, valid, test

    @property
    def exists(self) -> bool:
        """Whether there is validation data on this rank."""
        return bool(self._iterators)

    def restart(self, iterators: Any) -> bool:
        """Go back to the beginning; whether any of what Megatron evaluates on is the text.

        Args:
            iterators: an iterator or None, or a list of them, one per model chunk.
        """
        several = iterators if isinstance(iterators, list) else [iterators]
        held_out = [self._iterators[id(it)] for it in several if id(it) in self._iterators]
        for iterator in held_out:
            iterator.restart()
        return bool(held_out)
