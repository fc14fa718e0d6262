"""What a teacher says in a training step, on the ranks of the last pipeline stage, by its forward
passes.

Only samples of the teacher's domains are run. The TP x CP ranks of the stage hold the same
samples, so they share them (``forward.shared_forward``) instead of repeating them, and with the
other stages where these hold the teacher, too (``pipeline``). What is kept
is the pre-head hidden state of each sample, sliced to this rank's context-parallel part.

A teacher may lack some of the student's added tokens. It cannot read one, so from the first of them
on nothing in the window is taught by it, later documents included unless they are packed; states
are there, as if the text had gone on in another way, and ``readable`` says which to use.

Where documents are packed, each goes through the teacher by itself (``documents``).

Shapes: n micro-batches, b samples each, s sequence, c context-parallel size, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.data.packed import document_lengths
from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.target import Dense, Mixed, Sparse, Target
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.documents import document_forward
from megatron_moe_inject.teachers.forward import shared_forward
from megatron_moe_inject.teachers.pipeline import Pipeline, SpreadTeacher
from megatron_moe_inject.teachers.prefix import PrefixedTeacher


class DomainTeacher(Protocol):
    """What teaches a domain in a step: one teacher, or several together.

    Attributes:
        passes: each teacher by itself.
        windowed: whether what any says comes by windows of micro-batches, so that nothing is known
            of the whole step ahead.
    """

    @property
    def passes(self) -> tuple[StepTeacher, ...]: ...

    @property
    def windowed(self) -> bool: ...

    def together(self, targets: Sequence[Target]) -> Target:
        """What the teachers say as one, of a target of each for the same samples."""
        ...


class StepTeacher(DomainTeacher, Protocol):
    """One teacher in a step, whatever it is: on each rank of the last stage, what it says.

    ``TeacherPass`` is one that runs a model. Another, such as one that reads a store, needs nothing
    else to be distilled, measured and asked how sure it is than to hand out a ``Target``.

    Attributes:
        name: its key in the recipe.
        unknown: sorted ids of the student that it lacks, on the device; None where it has all.
        ran_bare: whether the step began ``bare`` and it reads a prefix otherwise.
        tp_group: shards its head over the vocabulary; None if it is whole, or has none.
    """

    unknown: torch.Tensor | None

    @property
    def name(self) -> str: ...

    @property
    def ran_bare(self) -> bool: ...

    @property
    def tp_group(self) -> dist.ProcessGroup | None: ...

    def begin(
        self,
        batches: Sequence[MicroBatch] | None,
        selected: torch.Tensor,
        sequence_length: int,
        *,
        bare: bool = False,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Start a step; ``batches`` are its micro-batches as they were read, ``selected``
        ``[n, b]`` their samples to teach, and ``starts`` ``[n, b, s]`` says where documents begin
        if they are packed."""
        ...

    def target(self, micro_batch: int) -> Target:
        """What it says about a micro-batch's k selected samples: tensors per token
        ``[k, s/c, ...]``. Asked once each, in order."""
        ...

    def bare_target(self, micro_batch: int) -> Target:
        """``target`` without its prefix, asked after that where it ``ran_bare``."""
        ...

    def readable(self, micro_batch: int) -> torch.Tensor | None:
        """Where it knows every token so far, ``[k, s/c]`` bool; None where it knows them all."""
        ...

    def of_step(self, wanted: torch.Tensor) -> tuple[torch.Tensor, Target]:
        """Tokens ``[k, s]`` and target of the samples ``wanted`` ``[n, b]`` of the whole step, if
        not ``windowed``."""
        ...

    def readable_of_step(self, wanted: torch.Tensor) -> torch.Tensor | None:
        """``readable`` of the samples of ``of_step``."""
        ...

    def next_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next token of each position of ``[k, s]``, -1 at the last; this rank's, flat."""
        ...


@runtime_checkable
class LayeredTeacher(Protocol):
    """A ``StepTeacher`` whose layers can be imitated, as of a ``TeacherPass``."""

    def readable(self, micro_batch: int | None = None) -> torch.Tensor | None:
        """As of a ``StepTeacher``; of the whole step unless a micro-batch is named."""
        ...

    def take_layer(self, layer: int) -> torch.Tensor:
        """The step's states after a layer, ``[k, s/c, h_t]`` for its k samples, once."""
        ...


class _Inputs(NamedTuple):
    """What a teacher reads of k samples; see ``Teacher.states``."""

    tokens: torch.Tensor
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    def of_rows(self, begin: int, end: int) -> _Inputs:
        """Of some of the samples."""
        others = (None if value is None else value[begin:end] for value in self[1:])
        return _Inputs(self.tokens[begin:end], *others)


class TeacherPass:
    """Runs one teacher over the step's samples and hands out what it says of them by micro-batch.

    Args:
        teacher: the loaded teacher.
        head: ``[v/p, h_t]`` this rank's rows of the teacher's head.
        tp_group: tensor-parallel group of the last stage; its first rank reads the data.
        cp_group: context-parallel group.
        share_group: the TP x CP ranks that share the samples.
        window: micro-batches whose states are kept at once, 0 for the whole step.
        layers: teacher layers whose states are wanted besides; needs the whole step at once.
        resets_documents: whether positions and attention start anew at each document
            (``--reset-position-ids``, ``--reset-attention-mask``), so that the teacher must see
            the batch's own ``position_ids`` and ``attention_mask``.
        transform: what makes its logits; by default the teacher's own.
        unknown: ids of the student that the teacher lacks.
        pipeline: the stages that share what is run before the schedule; None where the last stage
            runs it alone.
    """

    def __init__(
        self,
        teacher: Teacher,
        head: torch.Tensor,
        *,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        share_group: dist.ProcessGroup,
        window: int,
        layers: Sequence[int] = (),
        resets_documents: bool = False,
        transform: LogitTransform | None = None,
        unknown: Sequence[int] = (),
        pipeline: Pipeline | None = None,
    ) -> None:
        assert not (window and layers), "layer states are shared once per step"
        self.teacher = teacher
        self.head = head
        self.transform = teacher.logit_transform if transform is None else transform
        self.unknown = None
        if unknown:
            self.unknown = torch.tensor(sorted(unknown), device=head.device)
        self._tp_group = tp_group
        self._cp = (cp_group.rank(), cp_group.size())
        self._share_group = share_group if share_group.size() > 1 else None
        self._window = window
        self.layers = tuple(layers)
        self._input_names: tuple[str, ...] = ("tokens",)
        if resets_documents:
            self._input_names += ("position_ids", "attention_mask")
        self._pipeline = pipeline
        self._spread = SpreadTeacher(teacher, self.layers, resets_documents, window)
        self._states: dict[int, torch.Tensor] = {}
        self._layer_states: dict[int, torch.Tensor] = {}
        self._bare_teacher: Teacher | None = None
        self._bare_states: dict[int, torch.Tensor] = {}
        self._readable: torch.Tensor | None = None
        self._starts: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The teacher's key in the recipe."""
        return self.teacher.name

    def begin(
        self,
        batches: Sequence[MicroBatch] | None,
        selected: torch.Tensor,
        sequence_length: int,
        *,
        bare: bool = False,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Start a step: share the inputs of the selected samples and run the first window, or with
        a pipeline hand it to that.

        Args:
            batches: on the rank that reads data, the n micro-batches with ``tokens`` ``[b, s]``,
                and ``position_ids`` ``[b, s]`` and ``attention_mask`` ``[b, 1, s, s]`` where
                documents reset them; ``None`` elsewhere in the TP group. Only the selected samples
                of what is in use are copied: a mask has s times the size of its tokens.
            selected: ``[n, b]`` bool on the host, the samples this teacher teaches.
            sequence_length: s.
            bare: also run a teacher with a prefix without it.
            starts: ``[n, b, s]`` bool on the host, where documents begin; None unless packed.

        Collectives: one broadcast over the TP group per input that is in use; those of
        ``shared_forward`` or ``document_forward`` once per window, with ``bare`` twice.
        """
        self._bare_teacher = None
        if bare and isinstance(self.teacher, PrefixedTeacher):
            self._bare_teacher = self.teacher.bare
        self._selected = selected
        self._rows = selected.sum(dim=1).tolist()
        self._starts = None if starts is None else starts[selected]
        self._states.clear()
        self._layer_states.clear()
        self._bare_states.clear()
        self._inputs = self._share_inputs(batches, selected, sequence_length)
        self._read(self._inputs.tokens)
        if self._pipeline is None:
            self._run_window(0)
            return
        reading = self._spread.reading(selected, sequence_length, bare, starts)
        inputs = self._inputs._replace(tokens=self._known).of_rows(0, int(reading.selected.sum()))
        tensors = [tensor for tensor in inputs if tensor is not None]
        self._pipeline.add(self._spread, reading, tensors, self._take_first)

    def _take_first(self, states: list[torch.Tensor]) -> None:
        """Of the pipeline: those of the first window, of the layers, and last those without the
        prefix if they were asked for."""
        own = 1 + len(self.layers)
        self._take_window(0, states[:own], states[own:])

    def _read(self, tokens: torch.Tensor) -> None:
        """Find what can be read of ``[k, s]`` tokens, and stand something in for the rest."""
        self._known = tokens
        if self.unknown is None:
            return
        lacking = torch.isin(tokens, self.unknown)
        self._known = tokens.masked_fill(lacking, 0)
        lacked = lacking.cumsum(1)
        if self._starts is not None:
            lacked = lacked - _before_documents(lacked - lacking.long(), self._starts)
        readable = lacked == 0
        self._readable = context_parallel_slice(readable.unsqueeze(-1), *self._cp).squeeze(-1)

    def readable(self, micro_batch: int | None = None) -> torch.Tensor | None:
        """Where the teacher knows every token so far, ``[k, s/c]`` bool of a micro-batch's
        selected samples or of the step's; None where it knows them all."""
        if self._readable is None or micro_batch is None:
            return self._readable
        return self._readable.split(self._rows)[micro_batch]

    def _share_inputs(
        self, batches: Sequence[MicroBatch] | None, selected: torch.Tensor, length: int
    ) -> _Inputs:
        count = int(selected.sum())
        device = self.head.device
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((count, length), torch.int64),
            "position_ids": ((count, length), torch.int64),
            "attention_mask": ((count, 1, length, length), torch.bool),
        }
        source = dist.get_process_group_ranks(self._tp_group)[0]
        shared: dict[str, torch.Tensor] = {}
        for name in self._input_names:
            shape, dtype = shapes[name]
            if batches is not None:
                value = samples_of([batch[name] for batch in batches], selected.nonzero().tolist())
                value = torch.empty(shape) if value is None else value.reshape(shape)
                value = to_device(value, device).to(dtype)
            else:
                value = torch.empty(shape, dtype=dtype, device=device)
            if self._tp_group.size() > 1 and count:
                dist.broadcast(value, src=source, group=self._tp_group)
            shared[name] = value
        return _Inputs(**shared)

    def _stop(self, first: int) -> int:
        """Where a window ends."""
        return len(self._rows) if not self._window else min(len(self._rows), first + self._window)

    def _run_window(self, first: int) -> None:
        begin, end = sum(self._rows[:first]), sum(self._rows[: self._stop(first)])
        layer_states = self._forward(self.teacher, begin, end, self.layers)
        bare: list[torch.Tensor] = []
        if self._bare_teacher is not None:
            bare = self._forward(self._bare_teacher, begin, end)
        self._take_window(first, layer_states, bare)

    def _take_window(
        self, first: int, layer_states: Sequence[torch.Tensor], bare: Sequence[torch.Tensor]
    ) -> None:
        """Keep this rank's part of the states ``[k, s, h_t]`` of a window, by micro-batch."""
        numbers = self._rows[first : self._stop(first)]
        for whole in bare:
            bare_rows = context_parallel_slice(whole, *self._cp).split(numbers)
            self._bare_states |= dict(enumerate(bare_rows, start=first))
        states, *others = (context_parallel_slice(whole, *self._cp) for whole in layer_states)
        self._layer_states = dict(zip(self.layers, others, strict=True))
        for i, rows in enumerate(states.split(numbers), start=first):
            self._states[i] = rows

    def _forward(
        self, teacher: Teacher, begin: int, end: int, layers: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """States ``[k, s, h_t]`` of some of the step's samples, and those after ``layers``."""
        part = self._inputs._replace(tokens=self._known).of_rows(begin, end)
        group = self._share_group
        if self._starts is None:
            return shared_forward(teacher, *part, group=group, layers=layers)
        lengths = document_lengths(self._starts[begin:end])
        return document_forward(teacher, part.tokens, lengths, group=group, layers=layers)

    def target(self, micro_batch: int) -> Target:
        """What it says about a micro-batch's selected samples, states ``[k, s/c, h_t]``, once each,
        in order."""
        if micro_batch not in self._states:
            self._run_window(micro_batch)
        return self._dense(self._states.pop(micro_batch))

    @property
    def ran_bare(self) -> bool:
        """Whether the step began ``bare`` and the teacher has a prefix."""
        return self._bare_teacher is not None

    def bare_target(self, micro_batch: int) -> Target:
        """``target`` without the prefix, after that with it, in a step that began ``bare``."""
        return self._dense(self._bare_states.pop(micro_batch))

    def _dense(self, states: torch.Tensor) -> Dense:
        return Dense(states, self.head, self.transform)

    @property
    def passes(self) -> tuple[TeacherPass, ...]:
        """Itself: a domain's teachers, as of a ``CommitteePass``."""
        return (self,)

    @property
    def windowed(self) -> bool:
        """Whether its states come by windows of micro-batches."""
        return bool(self._window)

    def together(self, targets: Sequence[Target]) -> Target:
        """What the domain's teachers say as one: that of the only teacher."""
        (target,) = targets
        return target

    def of_step(self, wanted: torch.Tensor) -> tuple[torch.Tensor, Target]:
        """Tokens ``[k, s]``, and what it says about them, states ``[k, s/c, h_t]``, of some of the
        step's samples.

        Args:
            wanted: ``[n, b]`` bool on the host; only samples that this teacher teaches.

        Needs the whole step at once (``window`` 0).
        """
        assert not self._window, "the teacher runs ahead by a window of micro-batches"
        states = torch.cat([self._states[i] for i in range(len(self._rows))])
        samples = wanted[self._selected].nonzero().flatten().tolist()
        rows = index(samples, states.device)
        return self._inputs.tokens[rows], self._dense(states[rows])

    def readable_of_step(self, wanted: torch.Tensor) -> torch.Tensor | None:
        """``readable`` of the samples of ``of_step``."""
        if self._readable is None:
            return None
        samples = wanted[self._selected].nonzero().flatten().tolist()
        return self._readable[index(samples, self._readable.device)]

    def next_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next token of each position of ``[k, s]``, -1 at the last; this rank's, flat."""
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
        return context_parallel_slice(labels.unsqueeze(-1), *self._cp).flatten()

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The group over whose ranks the head is sharded."""
        return self._tp_group if self._tp_group.size() > 1 else None

    def take_layer(self, layer: int) -> torch.Tensor:
        """The step's states after one of ``layers``, ``[k, s/c, h_t]`` for its k samples, once."""
        return self._layer_states.pop(layer)


def _before_documents(counts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Of counts ``[k, s]`` that never fall, at each token that of the first token of its document,
    which begin where ``starts`` ``[k, s]`` on the host says."""
    places = torch.where(starts, torch.arange(starts.shape[1]), 0).cummax(1).values
    return counts.gather(1, to_device(places, counts.device))


@dataclass(frozen=True)
class CommitteePass:
    """Several teachers of one domain.

    Attributes:
        passes: one for each teacher.
        weights: one for each, see ``losses.target.Mixed``.
        by: how they are weighed at each token.
    """

    passes: tuple[StepTeacher, ...]
    weights: tuple[float, ...]
    by: str

    @property
    def windowed(self) -> bool:
        """Whether the states of any come by windows of micro-batches."""
        return any(member.windowed for member in self.passes)

    def together(self, targets: Sequence[Target]) -> Target:
        """What the domain's teachers say as one: their mixture, of a target of each."""
        # Mixed itself refuses what it cannot mix.
        return Mixed(cast(tuple[Dense | Sparse, ...], tuple(targets)), self.weights, self.by)
