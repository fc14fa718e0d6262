"""What a run measures on is there, and is read once.

Megatron repeats documents where more samples are asked of an entry of a blend than it has, in an
order that is shuffled over all repetitions, and pads a short blend's weights with a surplus. Text
that is read twice says nothing new, but would count as if it did, in every error bar. So where text
is measured on, a run is told at start how many samples each entry has, and how many batches that
makes. A profile that is recorded in training steps may see its text again; it then has no error
bars.

The datasets are looked at as Megatron has built them, on the first rank, which reads data in every
layout.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.entries import SPLITS
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.run_part import RunPart

_FLAGS = {"valid": "--valid-data-path", "test": "--test-data-path"}
_TEXT = {"valid": "validation", "test": "test"}
_NOTHING = (
    "{}: there is no {} data to measure on; set --eval-iters above 0, and a --split or {} that has "
    "some"
)


class MeasuredText(RunPart):
    """Stands where Megatron builds its data.

    Args:
        args: Megatron's arguments.
        facts: the student.
        labels: by split, the class of each entry.
        measured: splits whose text a number with an error bar comes from; empty for a run that
            leaves the validation data to Megatron.
        origin: what messages name as the reason for reading them.
    """

    def __init__(
        self,
        args: Namespace,
        facts: StudentFacts,
        labels: Mapping[str, Sequence[int]],
        measured: Sequence[str] = (),
        origin: str = "evaluation",
    ) -> None:
        self._args = args
        self._batches = args.eval_iters  # which Megatron replaces under --full-validation
        self._facts = facts
        self._labels = labels
        self._measured = measured
        self._origin = origin
        self._built: Sequence[Any] | None = None
        self._checked = False
        self.around = {
            "build_train_valid_test_datasets": self._notice,
            "build_train_valid_test_data_iterators": self._look,
        }

    def _notice(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        self.datasets(built)
        return built

    def _look(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        self.check()
        return built

    def datasets(self, built: Sequence[Any]) -> None:
        """Notice what was built; of several model chunks the first."""
        if self._built is None:
            self._built = built

    def check(self) -> None:
        """Fail on every rank where there is nothing to evaluate on, or too little of it.

        Does nothing after the first time: every model chunk has its data built.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: names the split, what each entry has and the largest ``--eval-iters``.
        """
        if not self._checked:
            self._checked = True
            on_first_rank(self._check)

    def repeated_in_training(self) -> set[int]:
        """Classes of which some training text is read more than once; known on the first rank."""
        if self._built is None or self._built[0] is None:
            return set()
        parts = _parts(self._built[0])
        if len(parts) != len(self._labels["train"]):
            return set()
        return {
            label
            for part, label in zip(parts, self._labels["train"], strict=True)
            if _repeats(part)
        }

    def _check(self) -> None:
        args = self._args
        if self._built is None:  # data of the script's own making
            return
        datasets = dict(zip(SPLITS, self._built, strict=True))
        whole = bool(getattr(args, "full_validation", False))
        reads = bool(self._batches or whole)
        if self._measured:
            there = [split for split in self._measured if datasets[split] is not None]
            if not (reads and there):
                names = " or ".join(_TEXT[split] for split in self._measured)
                flags = " or ".join(_FLAGS[split] for split in self._measured)
                raise RecipeError(_NOTHING.format(self._origin, names, flags))
            for split in there:
                if not (whole and split == "valid"):
                    self._check_once(split, datasets[split])
            self._check_twice(there)
        elif reads and datasets["valid"] is None:
            flag = f"--eval-iters {self._batches}"
            flag, remedy = ("--full-validation", "remove it") if whole else (flag, "set it to 0")
            raise RecipeError(
                f"{flag}: there is no validation data, on which Megatron evaluates at the latest "
                f"when training has ended; {remedy}, or set a --split or --valid-data-path that "
                "has some"
            )

    def _entries(self, split: str) -> Sequence[str]:
        return ("(mock data)",) if self._facts.mock_data else self._facts.data_paths[split]

    def _check_once(self, split: str, dataset: Any) -> None:
        args = self._args
        parts = _parts(dataset)
        batch = args.eval_global_batch_size
        needed = self._batches * batch
        if len(dataset) >= needed and not any(map(_repeats, parts)):
            return
        once = [_samples_once(part) for part in parts]
        weights = _weights(dataset, parts)
        blended = hasattr(dataset, "datasets")
        surplus = dataset.config.mid_level_dataset_surplus if blended else 0.0
        largest = _largest(needed // batch, batch, once, weights, surplus)
        entries = self._entries(split)
        named = entries if len(entries) == len(parts) else [type(part).__name__ for part in parts]
        have = ", ".join(f"{n} of {entry}" for n, entry in zip(once, named, strict=True))
        if largest:
            remedy = f"set it to {largest} or less, or hold out more text"
        else:
            remedy = f"hold out more text, or evaluate in batches of less than {batch} samples"
        raise RecipeError(
            f"--eval-iters {self._batches}: takes {needed} samples of {_TEXT[split]} text, of "
            f"which there are {have}, so that some would count twice ({self._origin}); {remedy} "
            f"(--split, {_FLAGS[split]})"
        )

    def _check_twice(self, splits: Sequence[str]) -> None:
        """No class reads one file twice, in one blend or in two."""
        per_split = any(getattr(self._args, f"{split}_data_path", None) for split in SPLITS) or (
            getattr(self._args, "per_split_data_args_path", None)
        )
        seen: dict[tuple[str, int], str] = {}
        for split in splits:
            if not per_split:
                seen.clear()  # a --split gives each its own documents
            entries = [os.path.normpath(entry) for entry in self._entries(split)]
            for entry, label in zip(entries, self._labels[split], strict=True):
                if (entry, label) in seen:
                    first = seen[entry, label]
                    where = "twice" if first == split else f"in the {_TEXT[first]} blend too"
                    raise RecipeError(
                        f"{_FLAGS[split] if per_split else '--data-path'}: {entry} stands {where}, "
                        f"so that its text would count twice ({self._origin}); name it once"
                    )
                seen[entry, label] = split


def _parts(dataset: Any) -> list[Any]:
    """The datasets of a blend, or the one that is none."""
    return list(getattr(dataset, "datasets", None) or [dataset])


def _samples_once(part: Any) -> int:
    """How many samples there are before a dataset repeats itself."""
    if not hasattr(part, "_get_num_tokens_per_epoch"):  # such as SFTDataset: one for each index
        indices = getattr(part, "indices", None)
        return len(part) if indices is None else len(indices)
    extra = part.config.add_extra_token_to_sequence
    return max(0, (part._get_num_tokens_per_epoch() - extra) // part.config.sequence_length)


def _repeats(part: Any) -> bool:
    """Whether Megatron shuffles repetitions of a dataset's documents into its samples."""
    num_samples = getattr(part, "num_samples", None)
    return num_samples is not None and num_samples > _samples_once(part)


def _weights(dataset: Any, parts: Sequence[Any]) -> Sequence[float] | None:
    """Weights that parts were built by; None where they are taken whole, as large as they are."""
    if any(getattr(part, "num_samples", None) is None for part in parts):
        return None
    return getattr(dataset, "weights", None) or [1.0]


def _largest(
    most: int,
    batch: int,
    once: Sequence[int],
    weights: Sequence[float] | None,
    surplus: float,
) -> int:
    """The largest number of batches, at most ``most``, that read nothing twice.

    Args:
        batch: samples of a batch.
        once: samples of each entry.
        weights: see ``_weights``; 1 in sum.
        surplus: what Megatron builds more of each entry, as a share.
    """
    if weights is None:
        return min(most, sum(once) // batch)

    def fits(batches: int) -> bool:
        needed = [math.ceil(math.ceil(batches * batch * w) * (1 + surplus)) for w in weights]
        return all(a <= n for a, n in zip(needed, once, strict=True))

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
