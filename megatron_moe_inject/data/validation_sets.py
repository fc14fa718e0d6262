"""Several validation sets (``--multiple-validation-sets --full-validation``), each read whole.

Megatron gives each set an iterator and evaluates one after the other, so the set says which entry
of the validation data a sample is of (``data.splits``). Two things are otherwise than Megatron does
them:

- It reads one sample at a time on each data-parallel rank and goes round: a rank that has fewer
  samples than another, or is asked for a batch of several, reads text again, which then counts
  twice. Here a set is filled up to whole batches by copies of its first sample of which no token
  counts, and every evaluation begins at its first sample.
- It takes the iterators of virtual pipeline stages, and those of test data, for validation sets.
  Here they are put into its order, and test data are evaluated as they are without the flags.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.datasets.utils import Split

from megatron_moe_inject.data.held_out import HeldOutIterator
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.run_part import RunPart

FLAG = "--multiple-validation-sets"


class ValidationSets(RunPart):
    """Stands where Megatron builds and evaluates its validation sets.

    Args:
        args: Megatron's arguments. ``eval_iters``, which under these flags Megatron replaces by the
            batches of each set, is made the same on every rank.
        entries: number of entries of the validation data.
    """

    def __init__(self, args: Namespace, entries: int) -> None:
        self._args = args
        self._entries = entries
        self._test_batches = args.eval_iters
        self._batches: list[int] = []
        self._built: Sequence[Any] = ()
        self._of_chunk: dict[int, list[HeldOutIterator | None]] = {}
        self.around = {
            "build_train_valid_test_datasets": self._notice,
            "build_train_valid_test_data_iterators": self._iterators,
            "evaluate_and_print_results": self._evaluate,
        }

    @property
    def samples(self) -> int:
        """Samples that an evaluation reads, with those that fill up batches."""
        return sum(self._batches) * self._args.eval_global_batch_size

    @property
    def exists(self) -> bool:
        """Whether this rank reads any of the sets."""
        return any(it is not None for sets in self._of_chunk.values() for it in sets)

    def restart(self, iterators: Any) -> bool:
        """Go back to the beginning of each set; whether this rank reads any of what Megatron
        evaluates on from them.

        Args:
            iterators: what ``evaluate_and_print_results`` was given.
        """
        sets = self._by_set(iterators)
        flat = [it for of_set in sets or () for it in _listed(of_set) if it is not None]
        for iterator in flat:
            iterator.restart()
        return bool(flat)

    def _notice(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        self._built = built[1] if isinstance(built[1], list) else [built[1]]
        return built

    def _iterators(self, stock: Callable, *args: Any, **kwargs: Any) -> tuple:
        """A model chunk's iterators, one for each set on ranks that read them.

        Collectives: for the first chunk those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: the script's sets are not the entries of the data.
        """
        self._args.eval_iters, self._built = self._test_batches, ()
        train, _, test = stock(*args, **kwargs)
        if not self._batches:
            self._batches = on_first_rank(self._count)
        self._args.eval_iters = list(self._batches)
        built = self._built or [None] * len(self._batches)
        valid = [self._iterator(*pair) for pair in zip(built, self._batches, strict=True)]
        self._of_chunk[id(valid)] = valid
        return train, valid, test

    def _count(self) -> list[int]:
        """Batches of each set."""
        if len(self._built) not in (1, self._entries):
            raise RecipeError(
                f"{FLAG}: this script makes {len(self._built)} sets of {self._entries} entries of "
                "validation data, so that a set does not say which entry it is; remove it"
            )
        return [-(-len(built) // self._args.eval_global_batch_size) for built in self._built]

    def _iterator(self, dataset: Any, batches: int) -> HeldOutIterator | None:
        if dataset is None:
            return None
        filled = FilledUp(dataset, batches * self._args.eval_global_batch_size)
        return HeldOutIterator(lambda: compat.validation_loader(filled, 0))

    def _by_set(self, iterators: Any) -> list[Any] | None:
        """What Megatron evaluates on, set by set, with a list of model chunks in each under virtual
        stages; None for data that are not the sets'."""
        if id(iterators) in self._of_chunk:
            return iterators
        chunks = _listed(iterators)
        if not chunks or any(id(chunk) not in self._of_chunk for chunk in chunks):
            return None
        return [list(of_set) for of_set in zip(*chunks, strict=True)]

    def _evaluate(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        given = compat.bound_arguments(stock, args, kwargs)
        sets = self._by_set(given["data_iterator"])
        if sets is None:
            with self._as_one_set():
                return stock(**given)
        self.restart(given["data_iterator"])
        return stock(**{**given, "data_iterator": sets})

    @contextlib.contextmanager
    def _as_one_set(self) -> Iterator[None]:
        """Inside, Megatron evaluates ``--eval-iters`` batches of one iterator."""
        usual = {
            "multiple_validation_sets": False,
            "full_validation": False,
            "validation_set_names": None,
            "eval_iters": self._test_batches,
        }
        before = {name: getattr(self._args, name, None) for name in usual}
        vars(self._args).update(usual)
        try:
            yield
        finally:
            vars(self._args).update(before)


class FilledUp(torch.utils.data.Dataset):
    """A data set with copies of its first sample behind it, of which no token counts.

    Args:
        dataset: its samples are dictionaries with a ``loss_mask``.
        samples: how many there are with the copies.
    """

    def __init__(self, dataset: Any, samples: int) -> None:
        self._dataset = dataset
        self._samples = samples
        # Of validation text Megatron's loader would make batches of one sample.
        self.split = Split.test

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place < len(self._dataset):
            return self._dataset[place]
        sample = self._dataset[0]
        mask = torch.as_tensor(sample["loss_mask"])
        return {**sample, "loss_mask": torch.zeros_like(mask)}


def _listed(thing: Any) -> list[Any]:
    return thing if isinstance(thing, list) else [thing]
