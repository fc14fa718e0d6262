"""Held-out pairs of answers: a set of their own beside the held-out text, read whole.

Entries of the validation data that hold pairs (``objective.preference``) leave Megatron's blend, or
its validation sets, before it builds them: the text of an evaluation is what it would be without
them, and its numbers, too. Behind each of Megatron's evaluations of validation text the pairs are
evaluated by the same function of Megatron's, each answer once, filled up to whole batches with
samples without an answer.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe_inject.data.held_out import HeldOutIterator
from megatron_moe_inject.data.labels import ANSWERS
from megatron_moe_inject.data.pairs import KEY, Layout, PairSamples
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, first_rank_with, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_FLAG = "--valid-data-path"


class HeldOutAnswers(torch.utils.data.Dataset):
    """Samples of all held-out pairs, one pass over them, and fillers behind.

    Args:
        parts: samples of each entry.

    Attributes:
        answered: samples with answers.
        pairs: how many there are.
        documents: m, see ``data.labels.ANSWERS``.
        samples: with the fillers.
    """

    def __init__(self, parts: Sequence[PairSamples]) -> None:
        self._parts = parts
        self.split = Split.test  # Megatron's loader then takes the batch size of evaluations
        self.pairs = sum(part.pairs for part in parts)
        self.answered = self.samples = sum(map(len, parts))
        self.documents = max(part.documents for part in parts)

    def filled_up(self, samples: int) -> None:
        """Let it have so many samples."""
        self.samples = samples

    def hashes(self) -> list[str]:
        """A hash of each pair, in the order of their numbers."""
        return [found for part in self._parts for found in part.hashes()]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place >= self.answered:
            return _without_answer(self[0])
        before = 0
        for part in self._parts:
            if place < len(part):
                break
            place, before = place - len(part), before + part.pairs
        sample = part[place]
        numbers = torch.full((self.documents,), -1)
        own = sample[ANSWERS]
        numbers[: len(own)] = torch.where(own >= 0, own + 2 * before, -1)
        return {**sample, ANSWERS: numbers}


def _without_answer(sample: dict[str, Any]) -> dict[str, Any]:
    nothing = {name: torch.full_like(sample[name], -1) for name in ("labels", ANSWERS)}
    return {**sample, **nothing, "loss_mask": torch.zeros_like(sample["loss_mask"])}


class HeldOutPairs(RunPart):
    """Takes held-out pairs out of the validation data, and evaluates them behind its text.

    Changes the run's arguments, facts and labels, so it starts before what looks at them.

    Attributes:
        entries: path prefixes of the pairs.
        pairs: how many there are; with the rest known on every rank once data are built.
        hashes: of each pair, by its number.
        documents: m, see ``data.labels.ANSWERS``.
        evaluated: is called around an evaluation of the pairs with what runs it, which says whether
            it ran to its end; ``None`` where nobody wants it.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._args = args = run.args
        labels, facts = run.labels["valid"], run.facts
        whose = list(zip(facts.data_paths["valid"], labels, strict=True))
        self.entries = [entry for entry, label in whose if label == PREFERENCE]
        text = [entry for entry, label in whose if label != PREFERENCE]
        _leave_text(args, [label != PREFERENCE for label in labels])
        run.facts = replace(facts, data_paths={**facts.data_paths, "valid": tuple(text)})
        run.labels["valid"][:] = [label for label in labels if label != PREFERENCE]
        for entry in self.entries:
            if self.entries.count(entry) > 1:
                raise RecipeError(f"{_FLAG}: {entry} stands twice, so that its pairs would count "
                                  "twice; name it once")  # fmt: skip
        self.pairs = self.documents = 0
        self.hashes: list[str] = []
        self.evaluated: Callable[[Callable[[], bool], dict[str, Any]], None] | None = None
        self._layout: Layout | None = None
        self._dataset: HeldOutAnswers | None = None
        self._batches = 0
        self._chunks: list[HeldOutIterator | None] = []
        self._test: list[Any] = []
        self.around = {
            "build_train_valid_test_datasets": self._notice,
            "build_train_valid_test_data_iterators": self._iterators,
            "evaluate_and_print_results": self._evaluate,
        }

    def _notice(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        valid = built[1][0] if isinstance(built[1], list) else built[1]
        if valid is not None and hasattr(valid, "config"):
            self._layout = Layout.of(valid)
        return built

    def _iterators(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """One more iterator for each model chunk, where it reads validation text.

        Collectives: for the first chunk those of ``agree`` and ``on_first_rank``.

        Raises:
            RecipeError: on every rank: an entry holds no pairs or longer ones, or the script makes
                data sets of another kind.
        """
        built = stock(*args, **kwargs)
        first = not self._chunks
        valid = built[1] if isinstance(built[1], list) else [built[1]]
        reads = any(iterator is not None for iterator in valid)
        if first:
            agree(lambda: self._build() if reads else None)
            self.pairs, self.documents, answered, self.hashes = on_first_rank(self._described)
            self._batches = -(-answered // self._args.eval_global_batch_size)
        iterator = None
        if reads:
            iterator = self._iterator()
            self._run.need(SplitRegistry).register_set(iterator, [PREFERENCE])
        self._chunks.append(iterator)
        self._test.append(built[2])
        return built

    def _build(self) -> None:
        if self._layout is None:
            raise RecipeError(
                f"{KEY}: the script makes validation data that is not Megatron's, so that it says "
                f"nothing of how samples of {self.entries[0]} are to be; leave it out of {_FLAG}",
                KEY,
            )
        mmap = bool(getattr(self._args, "mmap_bin_files", True))
        parts = []
        for entry in self.entries:
            files = IndexedDataset(entry, mmap=mmap)
            every = torch.arange(len(files.sequence_lengths)).numpy()
            parts.append(PairSamples(files, every, self._layout, entry))
        self._dataset = HeldOutAnswers(parts)

    def _described(self) -> tuple[int, int, int, list[str]]:
        made = self._dataset
        assert made is not None, "the first rank reads data in every layout"
        return made.pairs, made.documents, made.answered, made.hashes()

    def _iterator(self) -> HeldOutIterator:
        if self._dataset is None:  # a later chunk reads what the first does not
            self._build()
        dataset = self._dataset
        assert dataset is not None, "built"
        dataset.filled_up(self._batches * self._args.eval_global_batch_size)
        return HeldOutIterator(lambda: compat.validation_loader(dataset, 0))

    def _evaluate(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``evaluate_and_print_results``, and behind validation text the pairs.

        Collectives: that of ``first_rank_with``, and behind validation text those of an evaluation.
        """
        given = compat.bound_arguments(stock, args, kwargs)
        iterators = given["data_iterator"]
        several = iterators if isinstance(iterators, list) else [iterators]
        tests = [
            it for known in self._test for it in (known if isinstance(known, list) else [known])
        ]
        of_test = any(it is not None and any(it is known for known in tests) for it in several)
        result = stock(**given)
        if first_rank_with(of_test) is None and self.evaluated is not None:
            self.evaluated(lambda: self._run_through(given), given)
        return result

    def _run_through(self, given: dict[str, Any]) -> bool:
        for iterator in self._chunks:
            if iterator is not None:
                iterator.restart()
        several = len(given["model"]) > 1
        chunks: Any = self._chunks if several else self._chunks[0]
        return compat.evaluate_all(given, chunks, self._batches)


def _leave_text(args: Namespace, is_text: Sequence[bool]) -> None:
    """Let the validation data be those of its entries that are text, with their weights."""
    if args.per_split_data_args_path is not None:
        named = json.loads(Path(args.per_split_data_args_path).read_text("utf-8"))
        for split in ("train", "valid", "test"):
            words = named[split].split() if isinstance(named[split], str) else named[split]
            setattr(args, f"{split}_data_path", words)
        args.per_split_data_args_path = None
    words = args.valid_data_path
    each = len(words) // len(is_text)  # 2 with weights
    entries = [words[i * each : (i + 1) * each] for i in range(len(is_text))]
    kept = [word for entry, text in zip(entries, is_text, strict=True) if text for word in entry]
    args.valid_data_path = kept or None
