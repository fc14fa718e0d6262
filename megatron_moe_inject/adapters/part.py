"""Adapters in a run: made before DDP, trained at their own rates, off in the original."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_moe_inject.adapters.attached import Attached
from megatron_moe_inject.adapters.matrices import Matrix, matrices, wanted, whole_shape
from megatron_moe_inject.adapters.rates import Rate, mark, with_rates
from megatron_moe_inject.adapters.rows_part import RowsOfVocabulary
from megatron_moe_inject.adapters.stored import Stored
from megatron_moe_inject.adapters.token_labels import ChunkLabels, LabelledStep
from megatron_moe_inject.adapters.vocabulary import change_head
from megatron_moe_inject.data.packed import check_packed, packing_flag
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank, union
from megatron_moe_inject.host.beside import Beside
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import routers
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.recipe.adapter import OF_LOSS
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart

_SHOWN = 24
"""Ids of rows in a plan."""


class AdaptersPart(RunPart):
    """The adapters of a student; provides what switches them off (``Beside``)."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        train = run.recipe.train
        self._entries = train.adapters
        self._sets = run.recipe.factor_sets()
        self._labels: dict[Chunk, ChunkLabels] = {}
        if any(entry.by is not None for entry in self._entries):
            check_packed(run.args, run.largest_micro_batch, "by: domain of train.adapters")
        self._attached: list[Attached] = []
        self._targets = [(i, j) for i, e in enumerate(self._entries) for j in range(len(e.targets))]
        self._used: set[tuple[int, int]] = set()
        self._mistake: str | None = None
        self._stored = Stored(run)
        self._rows: RowsOfVocabulary | None = None
        if train.vocabulary_rows is not None:
            self._rows = RowsOfVocabulary(run, train.vocabulary_rows, self._stored)
        self.around = {"get_megatron_optimizer": with_rates}
        run.provide(Beside, Beside(self._off))

    def trains(self) -> Mapping[str, Any]:
        """The entries with what they are on, since the optimizer's state is theirs."""
        adapters: list[dict[str, Any]] = []
        for factors, named in zip(self._sets, self._stored.entries, strict=True):
            entry = factors.entry
            adapters.append({**named, "layers": entry.layers})
            if "experts" in entry.components:
                chosen = {str(layer): sorted(ids) for layer, ids in factors.selected.items()}
                adapters[-1]["experts"] = "all" if entry.experts == "all" else chosen
        rows = {} if self._rows is None else self._rows.asked()
        return {"adapters": adapters, "vocabulary_rows": rows}

    def prepare(self) -> None:
        """Compare them with those of the checkpoint that is to be loaded. No collective."""
        self._stored.prepare()
        self.writes_about = bool(self._run.args.save) and not self._stored.holds

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """The rows of the vocabulary are chosen before.

        Collectives: those of ``on_first_rank``, where rows are to be chosen.

        Raises:
            RecipeError: on every rank: none can be.
        """
        if self._rows is not None and self._stored.rows is None:
            self._stored.choose(on_first_rank(self._rows.choose))
        yield

    def before_ddp(self, chunks: Sequence[Chunk]) -> None:
        """Put adapters on the bare chunks' frozen matrices."""
        if self._rows is not None and self._stored.rows is None:
            self._stored.choose(self._rows.foreseen())
        for chunk in chunks:
            if self._rows is not None:
                self._rows.before_ddp(chunk)
            by_module: dict[torch.nn.Module, list[tuple[Matrix, list[int]]]] = defaultdict(list)
            for matrix in matrices(chunk):
                named = wanted(self._sets, matrix.place)
                for i, targets in named.items():
                    self._used.update((self._sets[i].number, j) for j in targets)
                entries = sorted({self._sets[i].number for i in named})
                shape = whole_shape(matrix, compat.process_groups(chunk))
                if named and self._mistake is None:
                    self._mistake = self._mistake_of(matrix, entries, shape)
                if len(entries) == 1 and not matrix.weight.requires_grad:
                    by_module[matrix.module].append((matrix, sorted(named)))
            labels = functools.partial(self._labels_of, chunk)
            for found in by_module.values():
                attached = Attached(found, self._sets, chunk, lambda: self._stored.holds, labels)
                self._attached.append(attached)
                for number, factor, parameter in attached.parameters:
                    entry = self._sets[number].entry
                    lr = entry.lr * (entry.lr_b if factor == "b" else 1.0)
                    mark(parameter, Rate(lr, entry.decay))

    def _labels_of(self, chunk: Chunk) -> ChunkLabels:
        """What tells a chunk's places of their tokens, made where one asks."""
        if chunk not in self._labels:
            packed = packing_flag(self._run.args) is not None
            self._labels[chunk] = ChunkLabels(chunk, packed=packed)
        return self._labels[chunk]

    def _mistake_of(
        self, matrix: Matrix, numbers: Sequence[int], shape: tuple[int, int]
    ) -> str | None:
        """What is wrong with the entries of a matrix, which all ranks hear of later.

        Args:
            shape: of the whole matrix.
        """
        last, name = f"train.adapters[{numbers[-1]}]", matrix.name
        if len(numbers) > 1:
            other = f"train.adapters[{numbers[0]}]"
            return f"{last}: names {name}, which {other} names too; leave it out of one of both"
        if self._entries[numbers[0]].by is not None and matrix.place.component == "output_layer":
            return f"{last}: names {name}, {OF_LOSS}; give it an entry without by: domain"
        if matrix.weight.requires_grad:
            return f"{last}: names {name}, which trains as a whole; leave it out of one of both"
        rank = self._entries[numbers[0]].rank
        if rank > min(shape):
            return f"{last}: has rank {rank}, but {name} is {list(shape)}; lower it"
        return None

    def loaded(self, student: BuiltStudent) -> None:
        """From now on checkpoints hold them.

        Collectives: those of ``RowsOfVocabulary.loaded``.
        """
        if self._rows is not None:
            self._rows.loaded(student, self._stored.holds)
        self._stored.loaded()

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """See that every target is there, and tell the loss what changes the output layer.

        Collectives: those of ``agree``, one all-reduce of a byte for each target and, with
        ``by: domain``, for each decoder layer.

        Raises:
            RecipeError: on every rank: a target names nothing, or what it cannot have.
        """
        agree(self._check)
        self._check_used()
        seam = self._run.get(LossSeam)
        if seam is not None and student.last is not None:
            change_head(seam, student.last)
        rows = None if self._rows is None else self._rows.attach(student)
        if any(entry.by is not None for entry in self._entries):
            self._send_to_experts(student)
        if not self._labels:
            return rows
        labelled = LabelledStep(list(self._labels.values()), rows)
        self._run.provide(LabelledStep, labelled)
        return labelled

    def _send_to_experts(self, student: BuiltStudent) -> None:
        """Let every rank of a layer send along what one of them wants to know of its rows.

        Collectives: one all-reduce of a byte for each decoder layer.
        """
        here = {layer for labels in self._labels.values() for layer in labels.expert_layers}
        anywhere = union(here, student.chunks[0].config.num_layers)
        for chunk in student.chunks:
            for layer, _ in routers(chunk):
                if layer in anywhere:
                    self._labels_of(chunk).of_experts(layer)

    def _check(self) -> None:
        if self._mistake is not None:
            raise RecipeError(self._mistake)

    def _check_used(self) -> None:
        numbers = {self._targets.index(pair) for pair in self._used}
        used = union(numbers, len(self._targets))
        for number, (i, j) in enumerate(self._targets):
            if number not in used:
                raise fail(
                    f"train.adapters[{i}].targets[{j}]", self._entries[i].targets[j],
                    "matches no matrix",
                    "name components that it has, or weights such as "
                    "decoder.layers.3.self_attention.linear_qkv.weight",
                )  # fmt: skip

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """With the ids of the rows that were chosen, as far as they fit a line."""
        ids = self._stored.rows
        if ids is None:
            return given
        shown = " ".join(map(str, ids[:_SHOWN])) + (" ..." if len(ids) > _SHOWN else "")
        return {**given, "rows of the vocabulary": [f"{len(ids)}: {shown}"]}

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        """Inside, the model is the original: nothing of them acts. No collective."""
        beside = [attached.adapter for attached in self._attached]
        if self._rows is not None:
            beside += [layer.rows for layer in self._rows.layers]
        for module in beside:
            module.on = False
        try:
            with contextlib.ExitStack() as stack:
                for labels in self._labels.values():
                    stack.enter_context(labels.off())
                yield
        finally:
            for module in beside:
                module.on = True
