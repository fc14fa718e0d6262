"""A store of chunks of text in a step: what a teacher with another tokenizer said before.

A store keeps of each of the student's tokens which chunk its label belongs to and how likely the
teacher found that (``store.chunk_format``), so that nothing is tokenised and no teacher runs. The
rank that reads the data looks the samples up before the schedule and hands 8 bytes a token on to
its tensor-parallel ranks. A chunk that a sample holds in part, or one of whose labels is masked, is
not told.

Shapes: k samples of a step, s sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import TOKEN_PLACES, samples_of
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.recipe.schema import TeacherSpec
from megatron_moe_inject.teachers.align.chunk_teacher import ChunkTeacher
from megatron_moe_inject.teachers.align.samples import counted_labels, on_host
from megatron_moe_inject.teachers.base import Comparison, TeacherInfo
from megatron_moe_inject.teachers.some_ids import handed_on
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.chunk_format import ChunkFormat, ChunkRows, chunks_of
from megatron_moe_inject.teachers.store.info import stored_info
from megatron_moe_inject.teachers.store.manifest import read_manifest
from megatron_moe_inject.teachers.store.rules import check_chunks
from megatron_moe_inject.teachers.store.step_teacher import OpenStores, StoredSource, stored_source
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags


class StoredChunkTeacher(ChunkTeacher):
    """``step_pass.StepTeacher`` of a store of chunks.

    Args:
        name: its key in the recipe.
        source: looks tokens up, on ranks that read data; None on others.
        layout: of its rows.
        tp_group: tensor-parallel group of the last stage; its first rank reads the data.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    def __init__(
        self,
        name: str,
        source: StoredSource | None,
        layout: ChunkFormat,
        *,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(name, cp_group, device)
        self._source = source
        self._layout = layout
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

        Collectives: over the tensor-parallel group one broadcast of the places of chunks and one of
        log-probabilities; none where it is one rank or nothing is selected.

        Raises:
            RecipeError: the store lacks a sample, was written from another text, or is damaged.
        """
        count = self._select(selected, sequence_length)
        if not count:
            return
        shape = (count, sequence_length)
        kinds = {"places": (shape, torch.int32), "log_probs": (shape, torch.float32)}
        found = None if batches is None else self._look_up(batches, selected, sequence_length)
        found = handed_on(found, kinds, self._group, self._device)
        self._tell(found["places"].long(), found["log_probs"])

    def _look_up(
        self, batches: Sequence[MicroBatch], selected: torch.Tensor, length: int
    ) -> dict[str, torch.Tensor]:
        assert self._source is not None, "a rank that reads data has opened the store"
        samples = selected.nonzero().tolist()
        places, tokens = (
            on_host(samples_of([batch[name] for batch in batches], samples)).reshape(-1)
            for name in (TOKEN_PLACES, "tokens")
        )
        content, _ = self._source.read(places, tokens)
        rows = self._layout.decode(content)
        rows = ChunkRows(*(part.reshape(-1, length) for part in rows))
        chunks, log_probs = chunks_of(rows, counted_labels(batches, selected, length))
        return {"places": torch.from_numpy(chunks), "log_probs": torch.from_numpy(log_probs)}


def check_stored(name: str, spec: TeacherSpec, flags: TokenizerFlags) -> TeacherInfo:
    """What the manifest says; as ``Alignment.check``.

    Raises:
        RecipeError: it is no store, was written with another tokenizer of the student's, or has no
            chunks of text.
    """
    source = parse_source(name, spec.source)
    manifest = read_manifest(source.path, source.error)
    check_chunks(name, spec, manifest.plan)
    chunks = manifest.plan.chunks
    assert chunks is not None, "checked"
    info = stored_info(source, flags.vocabulary(), spec.prefix, manifest)
    told = (
        f"its own tokenizer, {chunks.ids} ids; texts were aligned by their bytes when it was "
        "written"
    )
    shared = Comparison(told, student_size=info.shared.student_size)
    return dataclasses.replace(info, vocabulary=told, shared=shared, aligned=True)


def stored_teacher(
    run: RunContext, info: TeacherInfo, student: BuiltStudent, host_group: dist.ProcessGroup | None
) -> StoredChunkTeacher:
    """The store as a teacher of a step on a rank of the last stage; no collective.

    Raises:
        RecipeError: it is damaged.
    """
    name, groups = info.name, student.groups
    stores = run.need(OpenStores)
    layout = stores.manifests[name].plan.row_format
    assert isinstance(layout, ChunkFormat), "check_stored"
    return StoredChunkTeacher(
        name,
        stored_source(run, info) if groups.tp.rank() == 0 else None,
        layout,
        tp_group=groups.tp,
        cp_group=groups.cp,
        device=student.device,
    )
