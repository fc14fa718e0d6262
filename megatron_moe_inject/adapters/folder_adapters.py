"""Adapters of a checkpoint by the matrices of the Hugging Face folder that it was imported from.

Shapes: r rank, o outputs, i inputs of a matrix; A ``[r, i]``, B ``[o, r]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.convert.architectures.table import Entry, Slot
from megatron_moe_inject.convert.exporting import imported, same_bytes
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.naming import pieces_of
from megatron_moe_inject.convert.trained import TrainedCheckpoint
from megatron_moe_inject.host.domain_choice import NOTHING_CHOSEN, DomainChoice
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.stored_adapters import Site, StoredAdapters
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_MERGED = "export it with its weights: moe-inject merge-adapters, then export-hf"


@dataclass(frozen=True)
class Matrix:
    """One of Megatron's matrices that has adapters, as the folder has it.

    Attributes:
        entry: its tensors in the folder, and how they make it up.
        rank: of all its adapters together; 0 without one.
        scale: of the first of them.
        dtype: of its factors.
    """

    entry: Entry
    rank: int
    scale: float
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors in the folder."""
        return tuple(part.name for part in self.entry.parts)

    @property
    def expert(self) -> int | None:
        """Number of the expert that it is of."""
        return self.entry.slot.expert

    @property
    def inputs(self) -> int:
        """How many."""
        return self.entry.shape[1]

    def outputs(self) -> list[int]:
        """How many each of its tensors has."""
        rows = torch.empty((self.entry.shape[0], 0), device="meta")
        return [part.shape[0] for part in self.entry.form.outputs(rows) or ()]


@dataclass(frozen=True)
class Factors:
    """The one change of a matrix: ``scale * b @ a``, with b by the folder's tensors.

    Attributes:
        a: ``[r, i]``.
        b: ``[o, r]`` of each of the folder's tensors, its outputs in their order there.
    """

    a: torch.Tensor
    b: list[torch.Tensor]


class FolderAdapters:
    """The adapters and vocabulary rows of a checkpoint, by a folder's tensors.

    Args:
        checkpoint: opened; holds some.
        model: the folder that its student was imported from.
        choice: of one domain, where each has its own.

    Attributes:
        matrices: in the order of the model.
        rows: names of the folder's tensors that have vocabulary rows.
        ids: of these rows.
        base: the checkpoint that they began from.

    Raises:
        RecipeError: it has none, it is another model, or the folder has no such matrix.
    """

    def __init__(
        self,
        checkpoint: TorchDistCheckpoint,
        model: FolderModel,
        choice: DomainChoice = NOTHING_CHOSEN,
    ) -> None:
        stored = StoredAdapters.of(checkpoint)
        if stored is None:
            raise checkpoint.source.error(
                "holds neither adapters nor vocabulary rows", "export it by moe-inject export-hf"
            )
        stored = stored.chosen(choice, weighs=False)
        self._stored, self._checkpoint, self._model = stored, checkpoint, model
        self._trained = TrainedCheckpoint(checkpoint, model, adapters_apart=True)
        self.base = stored.described.base.checkpoint
        entries = self._by_site()
        self._sites: dict[Slot, Site] = {}
        self.matrices: list[Matrix] = []
        for site in stored.pairs:
            entry = entries[site]
            self._check_alone(entry, "adapters")
            if entry.pieces or entry.form.outputs(torch.empty(entry.shape[0], 0)) is None:
                raise self.error(f"has adapters of {entry.slot.name}, which {_own_form(entry)}")
            self._sites[entry.slot] = site
            self.matrices.append(self._matrix(entry, site))
        order = {entry.slot: number for number, entry in enumerate(model.entries)}
        self.matrices.sort(key=lambda matrix: order[matrix.entry.slot])
        self.ids = stored.ids
        self.rows = {self._rows_of(entries[name, ()]): name for name in stored.rows}

    def factors(self, matrix: Matrix, rank: int, scale: float) -> Factors:
        """Read and put together, no collective.

        Args:
            matrix: one of these, or one without adapters (``matrix_of``).
            rank: at least its own; the rest is zeros.
            scale: that the product is to have.

        Raises:
            RecipeError: a file cannot be read, or values are not finite.
        """
        site = self._sites.get(matrix.entry.slot)
        products = [] if site is None else self._stored.products(site)
        a = torch.zeros((rank, matrix.inputs), dtype=matrix.dtype)
        b = torch.zeros((matrix.entry.shape[0], rank), dtype=matrix.dtype)
        begin = 0
        for product in products:
            end = begin + product.a.shape[0]
            a[begin:end] = product.a
            own = product.b[: len(b)]  # without rows that pad a vocabulary
            same = product.scale == scale
            b[:, begin:end] = own if same else own.double() * (product.scale / scale)
            begin = end
        outputs = matrix.entry.form.outputs(b)
        assert outputs is not None, "looked at when the checkpoint was opened"
        return Factors(a, outputs)

    def matrix_of(self, entry: Entry) -> Matrix | None:
        """A slice of the model as a matrix, of rank 0 where it has no adapters; ``None`` for what
        could have none."""
        site = self._sites.get(entry.slot)
        if site is not None:
            return self._matrix(entry, site)
        if len(entry.shape) != 2 or not self.matrices:
            return None
        return Matrix(entry, 0, 1.0, self.matrices[0].dtype)

    def new_rows(self, tensor: str) -> torch.Tensor:
        """Vocabulary rows ``[k, h]`` of a tensor of the folder, in the order of ``ids``."""
        return self._stored.read(self._stored.rows[self.rows[tensor]])

    def rows_dtype(self, tensor: str) -> torch.dtype:
        """Of these rows."""
        return self._checkpoint.tensors[self._stored.rows[self.rows[tensor]]].properties.dtype

    def check_base(self, progress: Progress) -> None:
        """That nothing but adapters and rows was trained, and on this folder: all else is bitwise
        what an import of it gives. Reads both.

        Raises:
            RecipeError: something differs.
        """
        entries = self._model.entries
        changed = [entry for entry in progress(entries, len(entries)) if self._differs(entry)]
        if changed:
            names = listing((part.name for entry in changed for part in entry.parts), 4)
            raise self.error(
                f"holds other values of {names} than {self._model.folder.path}, which adapters "
                "do not have",
                f"name the folder that it was imported from; if they were trained, {_MERGED}",
            )

    def _differs(self, entry: Entry) -> bool:
        held = self._trained.slice(entry)
        if held is None:
            return False
        return not any(same_bytes(held, old) for old in imported(self._model, entry, held.dtype))

    def _by_site(self) -> Mapping[Site, Entry]:
        """The model's entries by where the checkpoint stores them."""
        naming = self._trained.naming
        return {
            (name, where.place): entry
            for entry in self._model.entries
            for where, _ in pieces_of(entry, naming.stored(entry.slot))
            for name in where.names
        }

    def _matrix(self, entry: Entry, site: Site) -> Matrix:
        pairs = self._stored.pairs[site]
        tensors = self._checkpoint.tensors
        rank = sum(tensors[pair.a].size[0] for pair in pairs)
        dtype = tensors[pairs[0].a].properties.dtype
        return Matrix(entry, rank, pairs[0].scale, dtype)

    def _rows_of(self, entry: Entry) -> str:
        """The folder's tensor of a vocabulary."""
        (part,) = entry.parts
        self._check_alone(entry, "vocabulary rows")
        if max(self.ids, default=0) >= entry.shape[0]:
            raise self.error(f"has vocabulary rows beyond the {entry.shape[0]} of {part.name}")
        return part.name

    def _check_alone(self, entry: Entry, what: str) -> None:
        """RecipeError for a matrix that the folder keeps once for several of Megatron's."""
        others = [e for e in self._model.entries if e.slot != entry.slot]
        if any(part in other.parts for other in others for part in entry.parts):
            raise self.error(
                f"has {what} of {entry.slot.name}, which the folder keeps as one tensor with "
                f"another ({entry.parts[0].name})",
                "train neither embedding nor output_layer of this architecture",
            )

    def error(self, problem: str, remedy: str = _MERGED) -> RecipeError:
        """An error that begins with the checkpoint."""
        return self._checkpoint.source.error(problem, remedy)


def _own_form(entry: Entry) -> str:
    if entry.pieces:
        return "checkpoints store in pieces"
    return f"the folder's {entry.parts[0].name} is no linear layer of"
