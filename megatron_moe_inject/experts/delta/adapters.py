"""Adapters in deltas: written as they are beside the slices, merged where the delta is applied.

What they change is named by the checksum of what the base holds there, as slices are: an adapter
goes onto no other matrix than the one that it was trained on.
"""

from __future__ import annotations

import functools
import operator

import torch

from megatron_moe_inject.experts.delta.files import DeltaFiles
from megatron_moe_inject.experts.delta.index import (
    Adapted,
    Adapters,
    DeltaFolder,
    Factors,
    NewRows,
    slice_checksum,
)
from megatron_moe_inject.experts.delta.weights import Weights
from megatron_moe_inject.host.domain_choice import DomainChoice
from megatron_moe_inject.host.errors import RecipeError, show
from megatron_moe_inject.host.gpt_names import Place, stacked_axes
from megatron_moe_inject.host.low_rank import (
    Product,
    Rounding,
    by_component,
    merged,
    rows_put_in,
)
from megatron_moe_inject.host.stored_adapters import Site, StoredAdapters
from megatron_moe_inject.host.torch_dist import CheckpointSource
from megatron_moe_inject.host.torch_dist_copy import Change

_BASE = "name the base it was made from"


class ExportedAdapters:
    """The adapters of a trained checkpoint on their way into a delta.

    Args:
        stored: the checkpoint's.
        after: its weights, by the names that the delta has.
    """

    def __init__(self, stored: StoredAdapters, after: Weights) -> None:
        self._stored, self._after = stored, after
        self._sites: dict[Site, Site] = {after.seen_at(*site): site for site in stored.pairs}
        self._rows = {after.seen_at(name, ())[0]: name for name in stored.rows}
        self._adapters = Adapters(stored.described.base, {}, {}, [], [])

    def take(
        self, name: str, place: Place, old: torch.Tensor, same: bool, files: DeltaFiles
    ) -> None:
        """Write the adapters of one slice, if it has any.

        Args:
            name, place: of the slice.
            old: what the base holds there.
            same: whether the trained checkpoint holds the same.

        Raises:
            RecipeError: it does not, and has adapters.
            OSError: the disk is full, say.
        """
        site, rows = self._sites.get((name, place)), self._rows.get(name)
        if site is None and rows is None:
            return
        if not same:
            base = self._adapters.base.checkpoint
            where = f"{name} {list(place)}" if place else name
            raise self._after.error(
                f"has adapters that began from {base}, and the base holds other values of {where}",
                "name that checkpoint as --base",
            )
        self._adapters.dtypes[name] = str(old.dtype).removeprefix("torch.")
        if site is not None:
            pairs = self._stored.pairs[site]
            changes = [Factors(pair.a, pair.b, pair.scale, pair.domain) for pair in pairs]
            for factor in (name for pair in pairs for name in (pair.a, pair.b)):
                self._add(factor, files)
            entry = Adapted(name, list(place), slice_checksum(old), changes)
            self._adapters.matrices.append(entry)
        if rows is not None:
            ids, values = self._stored.ids, self._stored.rows[rows]
            self._add(values, files)
            entry_rows = NewRows(name, slice_checksum(old[ids]), values, ids)
            self._adapters.rows.append(entry_rows)

    def index(self) -> Adapters:
        """What was taken."""
        taken, rows = len(self._adapters.matrices), len(self._adapters.rows)
        assert (taken, rows) == (len(self._sites), len(self._rows)), "every slice was shown"
        return self._adapters

    def _add(self, name: str, files: DeltaFiles) -> None:
        self._adapters.files[name] = files.add(name, self._stored.read(name))


def products(
    delta: DeltaFolder, entry: Adapted, shape: tuple[int, ...], choice: DomainChoice
) -> list[Product]:
    """The changes of a matrix that were chosen, read now.

    Args:
        delta: which holds them.
        entry: the matrix.
        shape: ``[out, in]`` that it must have.
        choice: of which domains, where each has its own.

    Raises:
        RecipeError: they do not fit.
    """
    chosen = [change for change in entry.changes if choice.weight(change.domain)]
    read = [
        Product(delta.read(c.a), delta.read(c.b), c.scale * choice.weight(c.domain)) for c in chosen
    ]
    for change, product in zip(chosen, read, strict=True):
        sizes = tuple(product.a.shape), tuple(product.b.shape)
        rank = sizes[0][0] if product.a.dim() == 2 else 0
        if len(shape) != 2 or sizes != ((rank, shape[1]), (shape[0], rank)):
            raise delta.damaged(
                f"holds {show(change.a)} as {list(sizes[0])} and {show(change.b)} as "
                f"{list(sizes[1])}, for a matrix {list(shape)}"
            )
    return read


def new_rows(delta: DeltaFolder, entry: NewRows, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows ``[k, h]``, read now.

    Args:
        shape: ``[v, h]`` of the vocabulary.

    Raises:
        RecipeError: they do not fit.
    """
    rows = delta.read(entry.rows)
    known = set(entry.ids) <= set(range(shape[0])) and len(set(entry.ids)) == len(entry.ids)
    if not known or tuple(rows.shape) != (len(entry.ids), *shape[1:]):
        raise delta.damaged(
            f"holds {show(entry.rows)} as {list(rows.shape)}, for {len(entry.ids)} ids of a "
            f"vocabulary {list(shape)}"
        )
    return rows


class AppliedAdapters:
    """The adapters of a delta on their way into a base.

    Args:
        delta: opened.
        adapters: its.
        base: by the names of the delta.
        choice: of which domains, where each has its own.

    Attributes:
        changes: by the base's own tensors.

    Raises:
        RecipeError: they name what the base has not, or are not those that are chosen.
    """

    def __init__(
        self, delta: DeltaFolder, adapters: Adapters, base: Weights, choice: DomainChoice
    ) -> None:
        choice.check(adapters.domains, delta.error)
        self._delta, self._adapters, self._base = delta, adapters, base
        self._matrices: dict[str, dict[Place, Rounding]] = {}
        self._rows: dict[str, Rounding] = {}
        self.changes: dict[str, Change] = {}
        sources: dict[str, dict] = {}
        for entry in adapters.matrices:
            shape = self._shape(entry.tensor, entry.place)
            name, place = base.place_of(entry.tensor, tuple(entry.place))
            if place in sources.setdefault(name, {}):
                raise self._none_of_its(entry.tensor, entry.place)
            sources[name][place] = None
            if any(choice.weight(change.domain) for change in entry.changes):
                sources[name][place] = functools.partial(products, delta, entry, shape, choice)
        for name, all_of_tensor in sources.items():
            by_place = {place: source for place, source in all_of_tensor.items() if source}
            self._matrices[name] = {}
            self.changes[name] = merged(by_place, stacked_axes(name), self._matrices[name])
        for rows in adapters.rows:
            shape = self._shape(rows.tensor, [])
            name, _ = base.place_of(rows.tensor, ())
            if name in self.changes:
                raise self._none_of_its(rows.tensor, [])
            self._rows[name] = Rounding()
            read = functools.partial(new_rows, delta, rows, shape)
            self.changes[name] = rows_put_in(rows.ids, read, self._rows[name])

    def check_base(self, source: CheckpointSource) -> None:
        """That the base holds what the adapters were trained on.

        Raises:
            RecipeError: it does not, and ``source`` says so.
        """
        for entry in self._adapters.matrices:
            held = self._base.read(entry.tensor, tuple(entry.place))
            self._check(source, held, entry.base_sha256, entry.tensor, entry.place)
        for rows in self._adapters.rows:
            new_rows(self._delta, rows, self._shape(rows.tensor, []))
            held = self._base.read(rows.tensor, ())[rows.ids]
            self._check(source, held, rows.base_sha256, rows.tensor, rows.ids)

    def roundings(self) -> dict[str, Rounding]:
        """What was lost, by component, once the changes have been made."""
        return by_component(self._matrices, self._rows)

    def _check(
        self, source: CheckpointSource, held: torch.Tensor, sha256: str, name: str, where: list[int]
    ) -> None:
        if slice_checksum(held) != sha256:
            raise source.error(
                f"holds other values of {name} {show(where)} than the base of the delta's "
                f"adapters ({self._adapters.base.checkpoint})",
                _BASE,
            )

    def _shape(self, name: str, place: list[int]) -> tuple[int, ...]:
        """Of a slice of the base; RecipeError where it has none there."""
        stored = self._base.tensors.get(name)
        sizes = () if stored is None else stored.size[: stacked_axes(name)]
        inside = len(place) == len(sizes)
        inside = inside and all(map(operator.contains, map(range, sizes), place))
        if stored is None or not inside:
            raise self._none_of_its(name, place)
        return stored.size[len(place) :]

    def _none_of_its(self, name: str, place: list[int]) -> RecipeError:
        where = f"{name} {place}" if place else name
        return self._delta.damaged(f"has adapters of {show(where)} that is none of the base's")
