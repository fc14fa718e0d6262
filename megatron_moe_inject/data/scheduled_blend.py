"""A training blend whose shares change by iteration, or that has pairs of answers.

Megatron's ``BlendedDataset`` has one set of weights and keeps to it from the first sample to the
last. Here its datasets are read in an order of our own: for each iteration the number of samples
of each entry is fixed at start, and within an iteration the entries are spread evenly. Each entry
is read from its first sample on, each sample once. The order is a function of the position, the
recipe and the flags, so that a resumed run goes on where it stopped and nothing has to be saved.

Entries of pairs (``data.pairs``) give each iteration an even number of samples, so that a batch has
both answers of each pair, at whichever places of it; each sample then says which it is. Packed, a
sample has both.

Kept are the counts by iteration and entry; the order of one batch is made when its first sample is
asked for. The price is that positions have to belong to iterations as they did from the start of
training: what changes that is refused, here or in ``refused_options``.

Shapes: I iterations, C classes, E entries of the blend, B samples of a batch.
"""

from __future__ import annotations

from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_moe_inject.data.apportion import (
    UNIT,
    dealt,
    diffuse,
    diffuse_pairs,
    spread,
    to_units,
)
from megatron_moe_inject.data.labels import ANSWERS, DATASET_ID
from megatron_moe_inject.data.pairs import PairSamples
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.recipe.run_part import RunPart


class SampleOrder:
    """Which sample of which entry each position of a run's training data is.

    Args:
        sizes: B of each iteration.
        labels: class of each entry.
        shares: by class, its share in each iteration, ``[I]``; 1 in sum.
        weights: of each entry, which divide its class among its entries.
        paired: the class of pairs of answers; None without.
        together: samples of it that belong into one batch: 2, or 1 where both answers of a pair are
            in one sample.

    Attributes:
        counts: samples of each entry in each iteration, ``[I, E]``.
        paired: whether an entry holds pairs, ``[E]``.
        starts: samples before each iteration and, last, in all, ``[I + 1]``.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        labels: Sequence[int],
        shares: dict[int, np.ndarray],
        weights: Sequence[float],
        paired: int | None = None,
        together: int = 2,
    ) -> None:
        self._members = [np.flatnonzero(np.equal(labels, label)) for label in shares]
        self.paired = (
            np.equal(labels, paired) if paired is not None else np.zeros(len(labels), bool)
        )
        by_class = _by_class(sizes, shares, paired if together == 2 else None)
        self.counts = np.zeros((len(sizes), len(labels)), dtype=np.int64)
        for label, class_counts, entries in zip(shares, by_class.T, self._members, strict=True):
            units = to_units(np.asarray(weights)[None, entries])
            within = np.broadcast_to(units, (len(sizes), len(entries)))
            of_unit = together if label == paired else 1
            self.counts[:, entries] = of_unit * diffuse(class_counts // of_unit, within)
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._first = np.cumsum(self.counts, axis=0) - self.counts

    @property
    def samples(self) -> np.ndarray:
        """How many samples of each entry the run takes, ``[E]``."""
        return self.counts.sum(axis=0)

    def iteration(self, position: int) -> int:
        """The iteration, from 0, that a position belongs to."""
        return bisect_right(self.starts, position) - 1

    def batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Entry and sample of it at each place of an evenly spread batch, ``[B]`` each."""
        counts = self.counts[iteration]
        classes = spread([counts[entries].sum() for entries in self._members])
        dataset_index = np.empty(len(classes), dtype=np.int16)  # as in BlendedDataset
        samples = np.empty(len(classes), dtype=np.int64)
        for index, entries in enumerate(self._members):
            dataset_index[classes == index] = entries[spread(counts[entries])]
        for entry in np.flatnonzero(counts):
            first = self._first[iteration, entry]
            samples[dataset_index == entry] = np.arange(first, first + counts[entry])
        return dataset_index, samples


def _by_class(
    sizes: Sequence[int] | np.ndarray, shares: dict[int, np.ndarray], paired: int | None
) -> np.ndarray:
    """Samples of each class in each iteration, ``[I, C]``; an even number of the paired one."""
    units = to_units(np.stack(list(shares.values()), axis=1))
    if paired is None or paired not in shares:
        return diffuse(sizes, units)
    at, whole = list(shares).index(paired), np.asarray(sizes, np.int64)
    pairs = 2 * diffuse_pairs(whole, units[:, at])
    others = np.delete(units, at, axis=1)
    assert others.shape[1], "a recipe has a domain, and its data a share"
    # What an odd batch of pairs alone has left goes to the first of the others.
    others[others.sum(axis=1) == 0, 0] = UNIT
    return np.insert(diffuse(whole - pairs, to_units(others)), at, pairs, axis=1)


class ScheduledBlend(torch.utils.data.Dataset):
    """Reads a blend's datasets in the order of a schedule.

    Args:
        blend: Megatron's ``BlendedDataset``.
        order: what stands at which position.
        micro_batch_size, lanes: how Megatron deals a batch to its data-parallel ranks.
    """

    def __init__(self, blend: Any, order: SampleOrder, micro_batch_size: int, lanes: int) -> None:
        self.split = blend.split
        self._datasets = blend.datasets
        self._order = order
        self._dealing = (micro_batch_size, lanes)
        self._documents = answers_at_most(blend)
        self._iteration = -1
        self._batch: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._order.starts[-1])

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"{position} is not one of {len(self)} training samples")
        iteration = self._order.iteration(position)
        if self._batch is None or iteration != self._iteration:
            self._batch, self._iteration = self._order.batch(iteration), iteration
        entries, samples = self._batch
        begin = int(self._order.starts[iteration])
        at = dealt(int(position) - begin, len(entries), *self._dealing)
        sample = {DATASET_ID: entries[at], **self._datasets[entries[at]][samples[at]]}
        if self._documents:
            sample[ANSWERS] = self._numbered(sample.get(ANSWERS), int(entries[at]))
        return sample

    def _numbered(self, answers: torch.Tensor | None, entry: int) -> torch.Tensor:
        """Numbers of pairs that no other entry's have, ``[m]``."""
        numbers = torch.full((self._documents,), -1)
        if answers is not None:
            pairs = answers // 2 * len(self._order.paired) + entry
            numbers[: len(answers)] = torch.where(answers >= 0, 2 * pairs + answers % 2, -1)
        return numbers


def answers_at_most(blend: Any) -> int:
    """Documents of a sample that may be answers, in any data set of a blend; 0 without pairs."""
    return max((d.documents for d in blend.datasets if isinstance(d, PairSamples)), default=0)


class BlendSchedule(RunPart):
    """Stands where Megatron builds its training data.

    Args:
        order: what stands at which position.
        entries: the blend's entries as the command line names them.
        args: Megatron's arguments.

    Attributes:
        documents: ``answers_at_most`` of the blend, on every rank once it is built.
    """

    def __init__(self, order: SampleOrder, entries: Sequence[str], args: Namespace) -> None:
        self._order = order
        self._entries = entries
        self._args = args
        self._problem: RecipeError | None = None
        self.documents = self._own_documents = 0
        self.around = {
            "build_train_valid_test_datasets": lambda stock, *a, **k: self.datasets(stock(*a, **k)),
            "build_train_valid_test_data_iterators": self._checked,
        }

    def _checked(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        self.check()
        return built

    def datasets(self, built: Sequence[Any]) -> tuple:
        """What was built, with our order of the training data on the ranks that have some.

        No collective: some ranks build nothing. What is wrong is kept for ``check``, with no
        training data until then, of which Megatron could say something else.
        """
        train, valid, test = built
        if train is None:
            return train, valid, test
        try:
            self._check_kind(train)
            self._make_pairs(train)
            self._check(train)
        except RecipeError as error:
            self._problem = error
            return None, valid, test
        self._own_documents = answers_at_most(train)
        from megatron.core import mpu

        lanes = mpu.get_data_parallel_world_size()
        return ScheduledBlend(train, self._order, self._args.micro_batch_size, lanes), valid, test

    def check(self) -> None:
        """Fail on every rank where a rank's data cannot be mixed.

        Collectives: those of ``agree``, and with pairs of answers of ``on_first_rank``.

        Raises:
            RecipeError: the data is no blend of Megatron's, an entry has too few samples, or a
                resumed run took its batches in other sizes.
        """
        agree(self._raise)
        if self._order.paired.any():  # the first rank reads data in every layout
            self.documents = on_first_rank(lambda: self._own_documents)

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _check_kind(self, train: Any) -> None:
        from megatron.core.datasets.blended_dataset import BlendedDataset

        if not isinstance(train, BlendedDataset) or len(train.datasets) != len(self._entries):
            key = "objective.preference" if self._order.paired.any() else "mixing"
            hinders, remedy = "shares cannot change", "write them as numbers"
            if self._order.paired.any():
                hinders, remedy = "it has no pairs of answers", "name the data with --data-path"
            raise RecipeError(
                f"{key}: the script trains on a {type(train).__name__}, not on Megatron's blend "
                f"of {len(self._entries)} entries, so {hinders}; {remedy}",
                key,
            )

    def _make_pairs(self, train: Any) -> None:
        """Samples of pairs in the place of what Megatron made of their documents."""
        samples = self._order.samples
        for number in np.flatnonzero(self._order.paired).tolist():
            built, entry = train.datasets[number], self._entries[number]
            train.datasets[number] = PairSamples.in_place_of(built, entry, int(samples[number]))

    def _check(self, train: Any) -> None:
        samples = self._order.samples
        for entry, dataset, needed in zip(self._entries, train.datasets, samples, strict=True):
            if needed > len(dataset):
                weights = " ".join(
                    f"{count / samples.sum():.6g} {name}"
                    for count, name in zip(samples, self._entries, strict=True)
                )
                raise RecipeError(
                    f"mixing: the run takes {needed} samples of {entry}, but Megatron built "
                    f"{len(dataset)}; write the weights {weights}, raise "
                    "--mid-level-dataset-surplus, or give a run of several batch sizes its length "
                    "by --train-samples",
                    "mixing",
                )
        self._check_start()

    def _check_start(self) -> None:
        """The positions that were read belong to the iterations that were made."""
        iteration, consumed = self._args.iteration or 0, self._args.consumed_train_samples
        starts = self._order.starts
        if iteration < len(starts) and starts[iteration] != consumed:
            raise RecipeError(
                f"mixing: the checkpoint's {iteration} iterations took {consumed} samples, but by "
                f"today's batch sizes they take {starts[iteration]}, so shares cannot follow the "
                "iteration; keep the batch sizes, begin anew with --finetune, or write shares as "
                "numbers",
                "mixing",
            )
