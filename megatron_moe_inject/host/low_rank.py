"""Low-rank changes of a stored matrix: W + s B A, rounded once, and what the rounding costs.

``merged`` and ``rows_put_in`` are changes of stored tensors (``torch_dist_copy.Change``), which
come in parts, whatever layout has written them.

Shapes: r rank, o outputs, i inputs; A ``[r, i]``, B ``[o, r]``, W ``[o, i]`` or a block of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_moe_inject.host.gpt_names import Place
from megatron_moe_inject.host.model_parts import component_of_stored
from megatron_moe_inject.host.text import table
from megatron_moe_inject.host.torch_dist_copy import Change, places_in

_BLOCK = 1 << 21
"""Values that are worked on at a time, in fp64."""


class Product(NamedTuple):
    """One change ``scale * b @ a``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def block(self, begin: Sequence[int], shape: Sequence[int]) -> Product:
        """The part of it that changes a block of the matrix."""
        (row, column), (rows, columns) = begin, shape
        a, b = self.a[:, column : column + columns], self.b[row : row + rows]
        return Product(a, b, self.scale)

    def value(self) -> torch.Tensor:
        """The change itself, ``[o, i]`` in fp64."""
        return self.scale * (self.b.double() @ self.a.double())


@dataclass
class Rounding:
    """What rounding did to the change of a matrix, or of several.

    Attributes:
        matrices: how many.
        error, change: largest magnitudes of the rounding error and of the change; of several
            matrices, of the one with the largest ``error / change``.
        squared_error, squared_change: sums over all values.
        values, lost: how many values have a change, and how many of them are stored as before.
    """

    matrices: int = 0
    error: float = 0.0
    change: float = 0.0
    squared_error: float = 0.0
    squared_change: float = 0.0
    values: int = 0
    lost: int = 0

    def add(self, old: torch.Tensor, change: torch.Tensor, new: torch.Tensor) -> None:
        """Count values of one matrix: before, the change in fp64, and as they are stored."""
        if not change.numel():
            return
        error = new.double() - (old.double() + change)
        self.error = max(self.error, error.abs().max().item())
        self.change = max(self.change, change.abs().max().item())
        self.squared_error += error.square().sum().item()
        self.squared_change += change.square().sum().item()
        changed = change != 0
        self.values += int(changed.sum())
        self.lost += int((changed & (old == new)).sum())

    def join(self, other: Rounding) -> None:
        """Count other matrices as well."""
        if other.largest >= self.largest:
            self.error, self.change = other.error, other.change
        self.matrices += other.matrices
        self.squared_error += other.squared_error
        self.squared_change += other.squared_change
        self.values += other.values
        self.lost += other.lost

    @property
    def largest(self) -> float:
        """The largest error over the largest change."""
        return self.error / self.change if self.change else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of the error over that of the change."""
        if not self.squared_change:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_change)


ROWS = "vocabulary rows"


def by_component(
    matrices: Mapping[str, Mapping[Place, Rounding]], rows: Mapping[str, Rounding]
) -> dict[str, Rounding]:
    """What was lost, by component of the model, of matrices by tensor and place and of rows."""
    joined: dict[str, Rounding] = {}
    for name, by_place in matrices.items():
        for rounding in by_place.values():
            joined.setdefault(component_of_stored(name), Rounding()).join(rounding)
    for rounding in rows.values():
        joined.setdefault(ROWS, Rounding()).join(rounding)
    return joined


def rounding_table(roundings: Mapping[str, Rounding]) -> list[str]:
    """The largest error of a matrix relative to its largest change, the root mean square of all
    relative to that of all changes, and the part of the values that are stored as before."""
    heads = "merged", "matrices", "largest rounding", "rms", "values not moved"
    rows: list[tuple[str, ...]] = [heads]
    for component, rounding in sorted(roundings.items()):
        lost = rounding.lost / rounding.values if rounding.values else 0.0
        numbers = [f"{n:.2g}" if n else "none" for n in (rounding.largest, rounding.rms, lost)]
        rows.append((component, str(rounding.matrices), *numbers))
    return [*table(rows, right=(1, 2, 3, 4)), "rounding is relative to the change, s B A"]


def merge(weight: torch.Tensor, products: Sequence[Product], rounding: Rounding) -> None:
    """Add products to a matrix in place: in fp64, rounded once to its type.

    Args:
        weight: ``[o, i]``.
        products: of that shape.
        rounding: what is lost is counted here.
    """
    rows = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, weight.shape[0], rows):
        block = weight[begin : begin + rows]
        change = torch.zeros(block.shape, dtype=torch.float64)
        for product in products:
            change += product.block((begin, 0), block.shape).value()
        new = rounded(block.double() + change, weight.dtype)
        rounding.add(block, change, new)
        block.copy_(new)


def merged(
    sources: Mapping[Place, Callable[[], Sequence[Product]]],
    axes: int,
    roundings: dict[Place, Rounding],
) -> Change:
    """The change of a stored tensor that adds products to some of its matrices.

    Args:
        sources: what gives the products of the matrix at a place, indices on the leading axes.
        axes: leading axes that number layers and experts.
        roundings: what is lost of each matrix is put here.
    """

    def change(begin: tuple[int, ...], part: torch.Tensor) -> bool:
        touched = False
        for place in places_in(begin, part.shape, axes):
            source = sources.get(place)
            if source is None:
                continue
            block = part[tuple(i - b for i, b in zip(place, begin, strict=False))]
            products = [product.block(begin[axes:], block.shape) for product in source()]
            merge(block, products, roundings.setdefault(place, Rounding(matrices=1)))
            touched = True
        return touched

    return change


def rows_put_in(ids: Sequence[int], read: Callable[[], torch.Tensor], rounding: Rounding) -> Change:
    """The change of a stored vocabulary ``[v, h]`` that puts rows in the place of its own.

    Args:
        ids: of the rows.
        read: gives them, ``[k, h]``; called once.
        rounding: what is lost is counted here.
    """
    read = functools.cache(read)
    places = torch.tensor(ids, dtype=torch.int64)

    def change(begin: tuple[int, ...], part: torch.Tensor) -> bool:
        row, column = begin
        inside = (places >= row) & (places < row + part.shape[0])
        if not inside.any():
            return False
        rounding.matrices = 1
        at = places[inside] - row
        exact = read()[inside, column : column + part.shape[1]].double()
        old, new = part[at], rounded(exact, part.dtype)
        rounding.add(old, exact - old.double(), new)
        part[at] = new
        return True

    return change


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 values rounded to the nearest of a type, ties to even, once.

    torch goes by way of fp32 to shorter types, which rounds twice. Here what is no fp32 value is
    first rounded to the odd one of its two neighbours, which is never a tie of a shorter type.
    """
    single = exact.float()
    if dtype.itemsize >= 4:
        return exact.to(dtype)
    inexact, even = single.double() != exact, (single.view(torch.int32) & 1) == 0
    infinity = torch.full_like(single, math.inf)
    toward = torch.where(exact > single.double(), infinity, -infinity)
    odd = torch.where(inexact & even, torch.nextafter(single, toward), single)
    return odd.to(dtype)
