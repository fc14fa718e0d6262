"""Which split of the data each of Megatron's iterators reads."""

from __future__ import annotations

from typing import Any


class SplitRegistry:
    """Remembers which split each data iterator reads, and the domain of its blend's entries.

    Megatron hands the step only iterators; training and validation blends may differ.

    Args:
        by_split: by split (``train``, ``valid``, ``test``), the domain index or ``GENERAL`` of each
            entry of the split's blend.
    """

    def __init__(self, by_split: dict[str, list[int]]) -> None:
        self.by_split = by_split
        self._by_iterator: dict[int, tuple[Any, list[int]]] = {}  # kept, so that no id comes twice

    def register(self, train: Any, valid: Any, test: Any) -> None:
        """Record what ``build_train_valid_test_data_iterators`` returned, once per model chunk.

        Args:
            valid: of several validation sets a list: one of each entry of the validation data, or
                one of all.
        """
        for split, iterator in (("train", train), ("valid", valid), ("test", test)):
            labels = self.by_split[split]
            several = isinstance(iterator, list) and len(iterator) == len(labels)
            of_set = [[label] for label in labels] if several else [labels]
            sets = iterator if isinstance(iterator, list) else [iterator]
            for one, own in zip(sets, of_set, strict=True):
                if one is not None:
                    self._by_iterator[id(one)] = one, own

    def register_set(self, iterator: Any, labels: list[int]) -> None:
        """Record one more iterator, and the label of each entry of what it reads."""
        self._by_iterator[id(iterator)] = iterator, labels

    def domain_of_entry(self, iterator: Any) -> list[int]:
        """Domain index or ``GENERAL`` by blend entry, of the data that ``iterator`` reads."""
        return self._by_iterator[id(iterator)][1]
