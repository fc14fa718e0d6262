"""Where each token of a sample stands in its data set, beside the sample.

Megatron cuts samples out of documents that it shuffles and joins, so that what was known about a
document's tokens before training (a store of what a teacher said) is found again only by the
document and the place in it. ``GPTDataset`` knows both while it makes a sample and tells neither.
Here its data sets get a key more, which says of each token the place in the ``.bin`` file. The step
takes it out again before stock code sees the batch (``labels.for_stock_code``).

A place is one int64: the number of the data set among those of the run in its upper bits, the
token's position in the file in the lower 44; -1 where a sample is filled up. It depends neither on
the layout nor on the order of samples, the blend or the sequence length.

Shapes: s sequence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_moe_inject.data.labels import TOKEN_PLACES
from megatron_moe_inject.host.agreement import agree
from megatron_moe_inject.host.errors import RecipeError, show
from megatron_moe_inject.recipe.run_part import RunPart

_FILE_BITS = 44


def number_data_sets(paths: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number of each data set of a run, by its path prefix; the same on every rank.

    Args:
        paths: by split, the entries of its blend.
    """
    known = sorted({os.path.normpath(path) for entries in paths.values() for path in entries})
    return {path: number for number, path in enumerate(known)}


def split_places(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the data sets, and positions in their files; -1 and anything for padding."""
    return places >> _FILE_BITS, places & ((1 << _FILE_BITS) - 1)


class WithPlaces(torch.utils.data.Dataset):
    """A ``GPTDataset`` whose samples say where their tokens stand; in all else it is that.

    Args:
        dataset: the data set.
        number: of its files among those of the run.
    """

    def __init__(self, dataset: Any, number: int) -> None:
        self._dataset = dataset
        self._number = number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dataset", "_number"):  # not there yet: unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int | None) -> dict[str, Any]:
        sample = self._dataset[place]
        positions = _positions(self._dataset, place, len(sample["tokens"]))
        places = np.where(positions < 0, -1, positions | self._number << _FILE_BITS)
        return {**sample, TOKEN_PLACES: torch.from_numpy(places)}


def _positions(dataset: Any, sample: int | None, length: int) -> np.ndarray:
    """Position in the ``.bin`` file of each of a sample's ``length`` tokens, -1 behind its text.

    The data set has made the sample before, so that its indices are there.
    """
    number = dataset.shuffle_index[0 if sample is None else sample]
    (first, offset), (last, end) = dataset.sample_index[number], dataset.sample_index[number + 1]
    documents = np.asarray(dataset.document_index[first : last + 1])
    index = dataset.dataset.index
    starts = np.asarray(index.sequence_pointers[documents], np.int64) // index.dtype_size
    stops = starts + np.asarray(index.sequence_lengths[documents], np.int64)
    # The token behind the sample, which is its last label, is cut off below.
    stops[-1] = starts[-1] + int(end) + dataset.config.add_extra_token_to_sequence
    starts[0] += int(offset)
    parts = [np.arange(a, b) for a, b in zip(starts, stops, strict=True)]
    positions = np.concatenate(parts)[:length]
    return np.concatenate([positions, np.full(length - len(positions), -1)])


class TokenPlaces(RunPart):
    """Stands where Megatron builds its data sets.

    Args:
        numbers: of ``number_data_sets``.
        origin: what messages name as the reason.
    """

    def __init__(self, numbers: Mapping[str, int], origin: str) -> None:
        self._numbers = numbers
        self._origin = origin
        self._problem: RecipeError | None = None
        self.around = {
            "build_train_valid_test_datasets": self._build,
            "build_train_valid_test_data_iterators": self._checked,
        }

    def _build(self, stock: Callable, *args: Any, **kwargs: Any) -> tuple:
        return tuple(self.placed(built) for built in stock(*args, **kwargs))

    def _checked(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        agree(self._raise)
        return built

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    def placed(self, built: Any) -> Any:
        """What was built for a split, one data set, a blend, several sets or nothing, with places.

        No collective: some ranks build nothing. What is wrong is raised when the iterators are
        there, on every rank.
        """
        if built is None:
            return None
        if isinstance(built, WithPlaces):  # of another model chunk
            return built
        if isinstance(built, list):
            return [self.placed(one) for one in built]
        from megatron.core.datasets.blended_dataset import BlendedDataset
        from megatron.core.datasets.gpt_dataset import GPTDataset

        if isinstance(built, BlendedDataset):
            built.datasets[:] = [self.placed(one) for one in built.datasets]
            return built
        # A kind of GPTDataset may give other tokens than its documents have.
        known = os.path.normpath(str(getattr(built, "dataset_path", None)))
        if type(built) is not GPTDataset or known not in self._numbers:
            self._problem = RecipeError(
                f"{self._origin}: the script's data is a {type(built).__name__} of "
                f"{show(getattr(built, 'dataset_path', None))}, whose samples do not say of which "
                "documents they are; use indexed data sets by --data-path"
            )
            return built
        return WithPlaces(built, self._numbers[known])
