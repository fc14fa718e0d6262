"""Adapters and rows of the vocabulary that a checkpoint holds beside the model's weights.

The factors of an adapter of the matrix ``<module>.weight`` are stored as
``<module>.inject_adapter.a.<set>.<layer>[.<expert>]`` ``[r, in]`` and ``...b...`` ``[out, r]``:
the matrix is W + s B A. Set is the position among the recipe's sets of adapters, of which an entry
of ``train.adapters`` makes one or, with ``by: domain``, one for each domain; layer and expert are
global numbers; a matrix outside of the layers has none. Rows of the vocabulary are
``<module>.inject_vocabulary_rows`` ``[k, h]``. What they are stands in Megatron's stored arguments
(``ARGUMENT``).

Whoever reads the weights and not these would have another model, so that ``refuse_adapters`` is
the first thing that a reader of a checkpoint calls which does not know them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.domain_choice import DomainChoice
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.gpt_names import Place, stacked_axes
from megatron_moe_inject.host.low_rank import Product
from megatron_moe_inject.host.model_parts import ADAPTER, VOCABULARY_ROWS, is_adapter
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint

ARGUMENT = "inject_adapters"
"""Megatron's stored argument that says what the adapters of a checkpoint are."""
VERSION = 1

_FACTOR = re.compile(
    rf"(?P<module>.+)\.{ADAPTER}\.(?P<factor>[ab])\.(?P<entry>\d+)(?P<numbers>(?:\.\d+)*)"
)
_AGAIN = "take the checkpoint as its run saved it"
_NEEDED = {"remedy": _AGAIN}
_ONE_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ONE_EXPERT = re.compile(r"\.experts\.experts\.(\d+)\.")

Site = tuple[str, Place]
"""A matrix: the stored tensor's name, and indices on its axes of layers and experts."""


@dataclass(frozen=True)
class Base:
    """What was loaded when the adapters began; see ``host.student_load.Origin``."""

    checkpoint: str = field(metadata=_NEEDED)
    iteration: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """One of ``train.adapters``, or one domain's of it.

    Attributes:
        targets: what it is put on.
        rank, alpha, scaling: as in the recipe.
        scale: of the product of its factors.
        domain: whose tokens alone pass it; ``None`` = all.
    """

    targets: list[str] = field(metadata=_NEEDED)
    rank: int = field(metadata=_NEEDED)
    alpha: float = field(metadata=_NEEDED)
    scaling: str = field(metadata=_NEEDED)
    scale: float = field(metadata=_NEEDED)
    domain: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of the vocabulary: row i is that of ``ids[i]``."""

    ids: list[int] = field(metadata=_NEEDED)


@dataclass(frozen=True)
class Described:
    """``ARGUMENT`` as it is stored."""

    version: int = field(metadata=_NEEDED)
    base: Base = field(metadata=_NEEDED)
    entries: list[Entry] = field(metadata=_NEEDED)
    vocabulary_rows: Rows | None = None


@dataclass(frozen=True)
class Pair:
    """The factors of one adapter, by their stored names, the scale of their product, and the domain
    that it is of."""

    a: str
    b: str
    scale: float
    domain: str | None = None


def refuse_adapters(names: Iterable[str], error: Callable[[str, str], RecipeError]) -> None:
    """Refuse a checkpoint whose adapters or rows would be left out.

    Args:
        names: of what would be left out, or of all that it holds.
        error: makes an error that begins with the checkpoint, of a problem and a remedy.

    Raises:
        RecipeError: there is one among them.
    """
    left = sorted(name for name in names if is_adapter(name))
    if left:
        raise error(
            f"holds adapters or vocabulary rows beside its weights ({listing(left, 2)}), without "
            "which it is another model",
            "write a checkpoint that has them in its weights by moe-inject merge-adapters",
        )


class StoredAdapters:
    """What a checkpoint says and holds of its adapters, held against its weights.

    Args:
        checkpoint: opened; holds an adapter or vocabulary rows.

    Attributes:
        described: its argument.
        pairs: the adapters of each matrix.
        rows: name of the stored rows by that of the matrix that they belong to.

    Raises:
        RecipeError: they are not what its arguments say, or do not fit its weights.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint) -> None:
        self._checkpoint = checkpoint
        self.described = self._describe()
        self.rows: dict[str, str] = {}
        found: dict[tuple[Site, int], dict[str, str]] = {}
        for name in filter(is_adapter, sorted(checkpoint.tensors)):
            module, _, last = name.rpartition(".")
            if last == VOCABULARY_ROWS:
                self.rows[f"{module}.weight"] = name
                continue
            match = _FACTOR.fullmatch(name)
            site = None if match is None else _site(match)
            if match is None or site is None:
                raise self.error(f"holds {name}, whose numbers name no matrix")
            found.setdefault((site, int(match["entry"])), {})[match["factor"]] = name
        self.pairs: dict[Site, tuple[Pair, ...]] = {}
        for (site, entry), names in sorted(found.items()):
            self.pairs[site] = (*self.pairs.get(site, ()), self._pair(site, entry, names))
        self._check_rows()
        left = set(range(len(self.described.entries))) - {entry for _, entry in found}
        if left:
            raise self.error(f"holds no adapter of entry {min(left)} of {ARGUMENT}")

    @classmethod
    def of(cls, checkpoint: TorchDistCheckpoint) -> StoredAdapters | None:
        """Those of a checkpoint, ``None`` where it has none."""
        return cls(checkpoint) if any(map(is_adapter, checkpoint.tensors)) else None

    @property
    def ids(self) -> list[int]:
        """Of the rows of the vocabulary."""
        rows = self.described.vocabulary_rows
        return [] if rows is None else rows.ids

    @property
    def domains(self) -> list[str]:
        """That have adapters of their own, in the order of the sets."""
        named = (entry.domain for entry in self.described.entries)
        return list(dict.fromkeys(name for name in named if name is not None))

    def chosen(self, choice: DomainChoice, *, weighs: bool = True) -> StoredAdapters:
        """These with what was chosen of the domains' adapters, weighed, and no other's.

        Args:
            weighs: see ``DomainChoice.check``.

        Raises:
            RecipeError: nothing was chosen where something must be, or what is not there.
        """
        choice.check(self.domains, self._checkpoint.source.error, weighs=weighs)
        some = copy.copy(self)
        weighed = {
            site: tuple(
                replace(pair, scale=pair.scale * choice.weight(pair.domain))
                for pair in pairs
                if choice.weight(pair.domain)
            )
            for site, pairs in self.pairs.items()
        }
        some.pairs = {site: pairs for site, pairs in weighed.items() if pairs}
        return some

    def read(self, name: str) -> torch.Tensor:
        """A factor, or rows, as stored. No collective."""
        stored = self._checkpoint.tensors[name]
        value = torch.empty(stored.size, dtype=stored.properties.dtype)
        self._checkpoint.read([Piece(name, tuple(value.shape), (0,) * value.dim(), value)])
        if not torch.isfinite(value).all():
            raise self.error(f"holds {name}, whose values are not all finite")
        return value

    def products(self, site: Site) -> list[Product]:
        """The changes of a matrix, read now."""
        return [Product(self.read(p.a), self.read(p.b), p.scale) for p in self.pairs[site]]

    def error(self, problem: str) -> RecipeError:
        """An error that begins with the checkpoint."""
        return self._checkpoint.source.error(problem, _AGAIN)

    def _describe(self) -> Described:
        plain: Any = getattr(self._checkpoint.args, ARGUMENT, None)
        if plain is None:
            raise self.error(f"holds adapters, and no {ARGUMENT} that says what they are")
        return described(plain, self._checkpoint.source.error)

    def _pair(self, site: Site, entry: int, names: Mapping[str, str]) -> Pair:
        weight, place = site
        where = f"{weight} {list(place)}" if place else weight
        stored = self._checkpoint.tensors.get(weight)
        sizes = () if stored is None else tuple(stored.size)
        axes = stacked_axes(weight)
        if not sizes or any(i >= size for i, size in zip(place, sizes[:axes], strict=True)):
            raise self.error(f"holds an adapter of {where}, which it has not")
        if len(names) != 2:
            (only,) = names.values()
            raise self.error(f"holds {only} without the other factor")
        if entry >= len(self.described.entries):
            raise self.error(f"holds {names['a']}, and {ARGUMENT} has no entry {entry}")
        of_entry = self.described.entries[entry]
        if len(sizes) - axes != 2:
            raise self.error(f"holds an adapter of {where}, which is no matrix")
        out, into = sizes[axes:]
        for factor, shape in (("a", (of_entry.rank, into)), ("b", (out, of_entry.rank))):
            held = tuple(self._checkpoint.tensors[names[factor]].size)
            if held != shape:
                raise self.error(
                    f"holds {names[factor]} as {list(held)}, where rank {of_entry.rank} of a "
                    f"matrix {[out, into]} asks for {list(shape)}"
                )
        return Pair(names["a"], names["b"], of_entry.scale, of_entry.domain)

    def _check_rows(self) -> None:
        tensors, ids = self._checkpoint.tensors, self.ids
        if ids and not self.rows:
            raise self.error(f"holds no vocabulary rows, of which {ARGUMENT} has {len(ids)}")
        for weight, name in self.rows.items():
            size = tuple(tensors[name].size)
            matrix = tuple(tensors[weight].size) if weight in tensors else (0,)
            fits = size == (len(ids), *matrix[1:]) and set(ids) <= set(range(matrix[0]))
            if not fits or len(set(ids)) != len(ids):
                raise self.error(
                    f"holds {name} as {list(size)}, where {ARGUMENT} has {len(ids)} ids and "
                    f"{weight} is {list(matrix)}"
                )
            if (weight, ()) in self.pairs:
                raise self.error(f"holds both adapters and vocabulary rows of {weight}")


def described(plain: Any, error: Callable[[str, str], RecipeError]) -> Described:
    """What ``ARGUMENT`` says.

    Args:
        plain: as stored.
        error: makes an error that begins with its source, of a problem and a remedy.

    Raises:
        RecipeError: it cannot be understood.
    """
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != VERSION:
        problem = f"describes its adapters in version {version} of {ARGUMENT}, this reads {VERSION}"
        raise error(problem, "use the version of this package that wrote it")
    try:
        return typed.build(Described, plain)
    except RecipeError as problem:
        raise error(f"has an {ARGUMENT} that cannot be ({problem})", _AGAIN) from None


def _site(match: re.Match[str]) -> Site | None:
    """The matrix of a factor; ``None`` where its numbers do not name one."""
    weight = f"{match['module']}.weight"
    numbers = [int(number) for number in match["numbers"].split(".")[1:]]
    layers = re.search(r"(^|\.)layers\.", weight) is not None
    experts = ".experts.experts." in weight
    if len(numbers) != layers + experts:
        return None
    for own, at in ((_ONE_EXPERT.search(weight), -1), (_ONE_LAYER.search(weight), 0)):
        if own is not None and numbers.pop(at) != int(own[1]):
            return None
    return weight, tuple(numbers)
