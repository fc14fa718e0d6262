"""A store in a step: what it says about the samples of its domains, in the place of a model.

The rank that reads the data looks the tokens up before the schedule and hands the rows on to its
tensor-parallel ranks as they are on disk, some hundred bytes a token; each unpacks a micro-batch's
when it is asked. Context-parallel ranks look up their own parts. No pipeline stage but the last
takes part.

Nothing is said about the last token of a document, after which the text goes on with another, and
``readable`` is False there. A store whose text is another one than the step's is an error.

Shapes: n micro-batches, b samples each, k samples of a micro-batch or a step, s sequence, c
context-parallel size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import TOKEN_PLACES, samples_of
from megatron_moe_inject.data.token_places import number_data_sets, split_places
from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.losses.target import Target
from megatron_moe_inject.recipe.run_kinds import EVALUATION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.some_ids import SomeIdsTeacher, handed_on
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.head import read_head
from megatron_moe_inject.teachers.store.manifest import Manifest
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.row_format import RowFormat
from megatron_moe_inject.teachers.store.rules import taught_by
from megatron_moe_inject.teachers.store.spoken import Spoken, SpokenIds, SpokenStates
from megatron_moe_inject.teachers.store.state_format import StateFormat


@dataclass(frozen=True)
class OpenStores:
    """The stores of a run, and where its data is in them.

    Attributes:
        manifests: by teacher, read and trusted.
        of_teacher: by teacher and path prefix, the position of the data set in the store.
    """

    manifests: Mapping[str, Manifest]
    of_teacher: Mapping[str, Mapping[str, int]]


class StoredSource:
    """Looks samples up in a store, on ranks that read data.

    Args:
        store: the store.
        data: by number of a data set of the run, its position in the store.
        names: path prefixes of these, for messages.
    """

    def __init__(self, store: Store, data: Mapping[int, int], names: Mapping[int, str]) -> None:
        self._store = store
        self._data = data
        self._names = names

    def read(self, places: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of some tokens, bytes [t, widest] and numbers of ids [t].

        Args:
            places: [t] of ``data.token_places``.
            tokens: [t] the ids that the step has there.

        Raises:
            RecipeError: the store lacks one, or was written from another text.
        """
        layout = self._store.layout
        content = np.zeros((len(places), layout.widest), np.uint8)
        counts = np.zeros(len(places), np.int64)
        numbers, positions = split_places(places)
        for number in np.unique(numbers[places >= 0]).tolist():
            members = np.flatnonzero((numbers == number) & (places >= 0))
            own = self._store.read(self._data[number], positions[members])
            content[members], counts[members] = own
        read = layout.tokens(torch.from_numpy(content)).numpy()
        other = np.flatnonzero((counts > 0) & (read != tokens))
        if len(other):
            at = other[0]
            raise self._store.failure(
                f"was written from another text than {self._names[int(numbers[at])]}: its token "
                f"{positions[at]:,} is {read[at]} in the store and {tokens[at]} in the data",
                "write it from this data",
            )
        return content, counts


class StoreTeacher(SomeIdsTeacher):
    """``step_pass.StepTeacher`` of a store.

    Args:
        name: its key in the recipe.
        source: looks samples up, on ranks that read data; None on others.
        spoken: makes targets of what was found.
        tp_group: tensor-parallel group of the last stage; its first rank reads the data.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    def __init__(
        self,
        name: str,
        source: StoredSource | None,
        spoken: Spoken,
        *,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(name, cp_group, device)
        self._source = source
        self._spoken = spoken
        self._group = tp_group

    def begin(
        self,
        batches: Sequence[MicroBatch] | None,
        selected: torch.Tensor,
        sequence_length: int,
        *,
        bare: bool = False,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Look the step's samples up; see ``step_pass.StepTeacher``.

        Args:
            batches: as they were read, with ``token_places``.

        Collectives: over the tensor-parallel group one broadcast of the rows, one of their numbers
        of ids and one of the tokens; none where it is one rank or nothing is selected.

        Raises:
            RecipeError: the store lacks a sample, was written from another text, or is damaged.
        """
        count, width = self._select(selected), sequence_length // self._cp[1]
        kinds = {
            "content": ((count, width, self._spoken.layout.widest), torch.uint8),
            "counts": ((count, width), torch.int32),
            "tokens": ((count, sequence_length), torch.int64),
        }
        found = None
        if batches is not None and count:
            found = self._look_up(batches, selected.nonzero().tolist())
        found = handed_on(found, kinds, self._group, self._device)
        self._content, self._counts = found["content"], found["counts"]
        self._tokens = found["tokens"]

    def _look_up(
        self, batches: Sequence[MicroBatch], samples: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        assert self._source is not None, "a rank that reads data has opened the store"
        places = samples_of([batch[TOKEN_PLACES] for batch in batches], samples)
        tokens = samples_of([batch["tokens"] for batch in batches], samples)
        assert places is not None and tokens is not None, "samples are selected"  # noqa: PT018
        tokens = tokens.cpu().view(places.shape)
        own = [
            context_parallel_slice(whole.unsqueeze(-1), *self._cp).flatten().numpy()
            for whole in (places.cpu(), tokens)
        ]
        content, counts = self._source.read(*own)
        return {
            "content": torch.from_numpy(content),
            "counts": torch.from_numpy(counts).int(),
            "tokens": tokens,
        }

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The group over whose ranks a head of states is sharded; None of ids."""
        return self._spoken.tp_group

    def target(self, micro_batch: int) -> Target:
        """What it says about a micro-batch's k selected samples, ``[k, s/c, ...]``."""
        rows = self._of(micro_batch)
        return self._spoken.target(self._content[rows], self._counts[rows])

    def _at_one(self, rows: slice | torch.Tensor) -> Target:
        return self._spoken.target(self._content[rows], self._counts[rows], at_one=True)

    def _readable(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Everywhere but at the end of documents."""
        return self._counts[rows] > 0


def stored_teacher(run: RunContext, info: TeacherInfo, student: BuiltStudent) -> StoreTeacher:
    """The store as a teacher of a step on a rank of the last stage; no collective.

    Raises:
        RecipeError: it is damaged, or knows ids that the student lacks.
    """
    name, groups = info.name, student.groups
    source = parse_source(name, info.source)
    if info.vocab_size > run.valid_vocab_size:
        raise source.error(
            f"has {info.vocab_size} ids, and the student's tokenizer {run.valid_vocab_size}",
            "write it with the student's tokenizer",
        )
    return StoreTeacher(
        name,
        stored_source(run, info) if groups.tp.rank() == 0 else None,
        _spoken(run, name, run.need(OpenStores).manifests[name], student),
        tp_group=groups.tp,
        cp_group=groups.cp,
        device=student.device,
    )


def stored_source(run: RunContext, info: TeacherInfo) -> StoredSource:
    """What looks the samples of a run up in a store; no collective.

    Raises:
        RecipeError: a part of it is not there.
    """
    source, stores = parse_source(info.name, info.source), run.need(OpenStores)
    numbers = number_data_sets(run.facts.data_paths)
    places = stores.of_teacher[info.name]
    return StoredSource(
        Store(source.path, source.error, stores.manifests[info.name]),
        {numbers[path]: place for path, place in places.items()},
        {number: os.path.basename(path) for path, number in numbers.items()},
    )


def _spoken(run: RunContext, name: str, manifest: Manifest, student: BuiltStudent) -> Spoken:
    plan, layout = manifest.plan, manifest.plan.row_format
    if isinstance(layout, StateFormat):
        return _states(run, name, manifest, layout, student)
    assert isinstance(layout, RowFormat), "chunks have another teacher of a step"
    spec, known = run.recipe.teachers[name], plan.temperatures
    # An evaluation measures at 1, unless only drawn ids are there, of which that is not known.
    temperature = known[0]
    if run.kind != EVALUATION:
        temperature = run.recipe.temperature(taught_by(run.recipe, name)[0])
    return SpokenIds(layout, known.index(temperature), temperature, spec.tail)


def _states(
    run: RunContext, name: str, manifest: Manifest, layout: StateFormat, student: BuiltStudent
) -> SpokenStates:
    """With this rank's rows of the head, those that get no probability left out."""
    assert student.last is not None, "a rank of the last stage"
    assert manifest.plan.states is not None, "whose layout it is"
    source, group = parse_source(name, run.recipe.teachers[name].source), student.groups.tp
    rows, valid = len(student.last.shared_embedding_or_output_weight()), run.valid_vocab_size
    start = group.rank() * rows
    head, transform = read_head(
        source.path,
        manifest.head_sha256,
        (layout.vocab_size, layout.hidden_size),
        layout.dtype,
        slice(start, start + rows),
        source.error,
    )
    excluded = {*manifest.plan.states.excluded, *range(layout.vocab_size, valid)}
    columns = sorted(i - start for i in excluded if start <= i < min(start + rows, valid))
    if columns:
        here = torch.tensor(columns, device=student.device)
        transform = dataclasses.replace(transform, excluded=here)
    return SpokenStates(
        layout, head.to(student.device), transform, group if group.size() > 1 else None
    )
