"""The loss hook: the objective in the place of Megatron's cross-entropy.

``GPTModel.forward`` takes an ``output_processor`` that gets the hidden states before any logits
exist, and returns the model's output, here one total loss per token. Stock scripts do not pass
it, so a forward pre-hook on the chunk with the output layer adds it. Micro-batches reach that
chunk in order in every schedule, so a counter tells which one is being processed; the loss
function that the script returned is wrapped to report the terms beside the total.

A trained head costs less if the gradient of the total will be one number times the loss mask, which
is so in Megatron's scripts (``fused_linear_distillation``'s ``upstream_mask``). In the first step
that trains, the loss function is asked for that gradient; another form ends the run with an error
that names the switch. Where only a later micro-batch shows it, the head's gradient becomes NaN.

Shapes: s sequence, b batch, h hidden, v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_moe_inject.data.packed import segments
from megatron_moe_inject.evaluation.measurement import Measurement
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.indices import index as positions
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights, injection_loss
from megatron_moe_inject.losses.report import LossReport, merge
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.triton_rows import AUTO
from megatron_moe_inject.losses.upstream import common_factor
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.teachers.confidence import RunningConfidence, confidences
from megatron_moe_inject.teachers.step_pass import CommitteePass, TeacherPass


class LossHook:
    """Computes the objective on the model chunk that holds the output layer.

    Args:
        chunk: bare GPT model chunk with ``post_process``.
        weights_at: the weights after that many optimiser steps, by domain index, and under
            ``host.labels.GENERAL`` those of general samples.
        teachers: by index of the domains that are distilled.
        report: what to log.
        tp_group: group that shards the vocabulary.
        valid_vocab_size: number of ids that are not padding.
        originals: the original parameters, where general samples are held to the original model.
        masked_sum: the script's loss is the sum of the token losses times the loss mask, times one
            number.
        kernels: see ``fused_linear_distillation``.
        measurement: gets the micro-batches of evaluations that it is to measure.
        only_measures: the run trains nothing: the output is the measured cross-entropy.
        watch: is shown the states that the loss is computed from, and the loss.
        running_confidence: gets the micro-batches of training steps.
        cp_group: group that divides sequences.
        by_document: packed rows were divided among it document by document; see ``data.packed``.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        weights_at: Callable[[int], Mapping[int, TermWeights]],
        teachers: Mapping[int, TeacherPass | CommitteePass],
        report: LossReport,
        *,
        tp_group: torch.distributed.ProcessGroup,
        valid_vocab_size: int,
        originals: OriginalParameters | None = None,
        masked_sum: bool = True,
        kernels: str | None = AUTO,
        measurement: Measurement | None = None,
        only_measures: bool = False,
        watch: FiniteWatch | None = None,
        running_confidence: RunningConfidence | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
        by_document: bool = False,
    ) -> None:
        self._cp_group = cp_group
        self._by_document = by_document
        self._watch = watch
        self._running_confidence = running_confidence
        self._measurement = measurement
        self._only_measures = only_measures
        self._chunk = chunk
        self._originals = originals
        self._original_states: list[torch.Tensor] | None = None
        self._original_place: dict[tuple[int, int], int] = {}
        self._weights_at = weights_at
        self._weights: Mapping[int, TermWeights] = {}
        self._teachers = teachers
        self._report = report
        self._tp_group = tp_group if tp_group.size() > 1 else None
        self._valid_vocab_size = valid_vocab_size
        self._labels: list[list[int]] | None = None
        self._next = 0
        self._keeping = False
        self._masked_sum = masked_sum
        self._kernels = kernels
        self._checked = self._checking = False
        self._pending: deque[tuple[dict[str, torch.Tensor], torch.Tensor | None]] = deque()
        chunk.register_forward_pre_hook(self._add_output_processor, with_kwargs=True)

    @property
    def teachers(self) -> list[TeacherPass]:
        """The teachers in use, each once."""
        return list(dict.fromkeys(t for own in self._teachers.values() for t in own.passes))

    @property
    def compares_prefix(self) -> bool:
        """Whether teachers are also to run without their prefix in the step that comes."""
        return self._measurement is not None and self._measurement.compares_prefix

    def taught_by(self, teacher: TeacherPass) -> list[int]:
        """Indices of the domains that ``teacher`` teaches."""
        return [index for index, own in self._teachers.items() if teacher in own.passes]

    def confidences(self, kind: str, labels: torch.Tensor) -> torch.Tensor:
        """Of the teacher or teachers of each sample, fp32 ``[n, b, s/c]``; 0 where it has none, or
        one whose states come by windows. At least one must run the whole step ahead.

        Args:
            kind: see ``confidence.confidences``.
            labels: ``[n, b]`` on the host.

        Collectives: those of ``confidence.confidences``, for each such teacher or committee.
        """
        whole = None
        for own in dict.fromkeys(self._teachers.values()):
            if own.windowed:
                continue
            domains = [index for index, other in self._teachers.items() if other == own]
            wanted = torch.isin(labels, torch.tensor(domains))
            sure = confidences(own, kind, wanted, self._valid_vocab_size, kernels=self._kernels)
            if whole is None:
                whole = sure.new_zeros(labels.numel(), sure.shape[1])
            where = wanted.flatten().nonzero().flatten().tolist()
            whole.index_copy_(0, positions(where, whole.device), sure)
        return whole.view(*labels.shape, -1)

    def begin(self, labels: torch.Tensor, iteration: int) -> None:
        """Start a step whose micro-batches have these labels, ``[n, b]`` on the host."""
        self._labels = labels.tolist()
        self._weights = self._weights_at(iteration)
        self._next = 0
        self._pending.clear()
        if self._originals is not None:
            general = (labels == GENERAL).nonzero().tolist()
            self._original_place = {tuple(where): i for i, where in enumerate(general)}
            self._original_states = []

    def end(self) -> None:
        """Finish the step; forward passes outside a step keep the stock output."""
        self._labels = self._original_states = None
        self._checked |= self._checking

    @contextlib.contextmanager
    def keeping_original_states(self) -> Iterator[None]:
        """Inside, forward passes are the original model's: keep their states, form no loss."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def wrap_forward_step(self, forward_step: Callable) -> Callable:
        """The script's ``forward_step`` with its loss function reporting our terms as well."""

        @functools.wraps(forward_step)
        def wrapped(*args, **kwargs):
            output, loss_func = forward_step(*args, **kwargs)
            return output, self._wrap_loss_func(loss_func)

        return wrapped

    def _wrap_loss_func(self, loss_func: Callable) -> Callable:
        @functools.wraps(loss_func)
        def wrapped(output_tensor, **kwargs):
            outputs = loss_func(output_tensor, **kwargs)
            if kwargs.get("non_loss_data"):
                return outputs
            *loss, report = outputs
            values, mask = self._pending.popleft()
            if mask is not None and not self._checked:
                self._check_masked_sum(loss[0], output_tensor, mask)
            return (*loss, merge(report, values))

        return wrapped

    def _check_masked_sum(
        self, loss: torch.Tensor, total: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """Raise ValueError unless ``loss`` has a gradient by ``total`` proportional to ``mask``."""
        self._checking = True
        (gradient,) = torch.autograd.grad(loss, total, retain_graph=True)
        dtype = self._chunk.config.params_dtype
        if common_factor(gradient.flatten(), mask.flatten(), dtype).isnan():
            raise ValueError(
                "objective.masked_sum: true, but this script's loss is not the sum of the token "
                "losses times the loss mask, times one number; set objective.masked_sum: false "
                "(a trained output layer then computes its logits twice)"
            )

    def _add_output_processor(self, chunk, args, kwargs):
        if self._labels is None or kwargs.get("labels") is None:
            return None
        return args, kwargs | {"output_processor": self._process}

    def _process(
        self, *, hidden_states, output_layer, output_weight, labels, loss_mask, config, **_
    ) -> torch.Tensor:
        """``output_processor`` of Megatron: ``[s(/p under SP), b, h]`` to total loss ``[b, s]``."""
        if self._keeping:
            self._original_states.append(hidden_states.detach())
            return hidden_states.new_zeros(labels.shape, dtype=torch.float32)
        index, self._next = self._next, self._next + 1
        domains = self._labels[index]
        head = output_layer.weight if output_weight is None else output_weight
        compat.run_forward_pre_hooks(output_layer, hidden_states)
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self._tp_group
            )
        row = labels.shape
        if len(labels) != len(domains):
            hidden_states, labels, loss_mask, domains = self._by_segment(
                hidden_states, labels, loss_mask, domains
            )
        self._see("states before the output layer", hidden_states)
        groups = self._groups(index, domains, labels, head, config.sequence_parallel)
        running = self._running_confidence
        if running is not None and torch.is_grad_enabled():
            running.add(
                groups, labels, domains, self._tp_group, self._valid_vocab_size,
                kernels=self._kernels,
            )  # fmt: skip
        transform = LogitTransform(scale=compat.logit_scale(config))
        values: dict[str, torch.Tensor] = {}
        if self._measurement is not None and self._measurement.active:
            measured, values = self._measurement.micro_batch(
                index, hidden_states, head, labels, loss_mask, domains, groups,
                transform=transform, kernels=self._kernels,
            )  # fmt: skip
            if self._only_measures:
                values |= self._report.values(measured, loss_mask, domains)
                self._pending.append((values, None))
                return measured.total
        promise = self._masked_sum and head.requires_grad and torch.is_grad_enabled()
        upstream_mask = loss_mask if promise else None
        terms = injection_loss(
            hidden_states,
            head,
            labels,
            groups,
            tp_group=self._tp_group,
            valid_vocab_size=self._valid_vocab_size,
            reduce_hidden_grad=not config.sequence_parallel,
            accumulate_main_grad=config.gradient_accumulation_fusion and head.requires_grad,
            student_transform=transform,
            upstream_mask=upstream_mask,
            kernels=self._kernels,
        )
        self._see("loss", terms.total)
        if self._watch is not None:
            name = "gradient of the states before the output layer"
            self._watch.see_gradient(name, hidden_states)
        values |= self._report.values(terms, loss_mask, domains)
        self._pending.append((values, upstream_mask))
        return terms.total.view(row)

    def _by_segment(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        domains: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """A packed row, states ``[t, 1, h]`` and ``[1, t]``, as k segments of one sample each."""
        assert len(labels) == 1, (labels.shape, len(domains))
        size, rank = 1, 0
        if self._cp_group is not None:
            size, rank = self._cp_group.size(), self._cp_group.rank()
        own = segments(len(domains), labels.numel(), size, rank, by_document=self._by_document)
        hidden = hidden.view(len(own), -1, hidden.shape[-1]).transpose(0, 1)
        labels, loss_mask = (x.reshape(len(own), -1) for x in (labels, loss_mask))
        return hidden, labels, loss_mask, [domains[sample] for sample in own]

    def _see(self, name: str, tensor: torch.Tensor) -> None:
        if self._watch is not None:
            self._watch.see(name, tensor)

    def _groups(
        self,
        index: int,
        domains: Sequence[int],
        labels: torch.Tensor,
        head: torch.Tensor,
        sequence_parallel: bool,
    ) -> list[SampleGroup]:
        """Partition of a micro-batch into groups of equal weights and teacher.

        The teacher of general samples is the original model, where they are held to it.
        """
        members: dict[tuple[bool, TermWeights, TeacherPass | CommitteePass | None], list[int]] = {}
        for position, domain in enumerate(domains):
            kind = (domain == GENERAL, self._weights[domain], self._teachers.get(domain))
            members.setdefault(kind, []).append(position)
        states = {t: self._states_by_sample(t, index, domains) for t in self.teachers}
        bare_states = {t: t.bare_states(index) for t in self.teachers if t.ran_bare}
        for own, (_, hidden) in states.items():
            self._see(f"states of teacher {own.teacher.name}", hidden)
        groups = []
        for (general, weights, teacher), samples in members.items():
            if teacher is None:
                if general and self._originals is not None:
                    hidden = self._original_hidden(index, samples, sequence_parallel)
                    self._see("states of the original model", hidden)
                    origin = LogitTransform(scale=compat.logit_scale(self._chunk.config))
                    original_head = self._originals.of(head)
                    groups.append(SampleGroup(samples, weights, hidden, original_head, origin))
                else:
                    groups.append(SampleGroup(samples, weights))
                continue
            hidden = [_of_samples(states[own], samples) for own in teacher.passes]
            if isinstance(teacher, CommitteePass):
                group = SampleGroup(samples, weights, committee=teacher.committee(hidden))
            else:
                group = SampleGroup(samples, weights, hidden[0], teacher.head, teacher.transform)
            readable = self._readable(teacher, index, domains, samples, labels)
            bare = self._bare(teacher, group, states, bare_states)
            groups.append(dataclasses.replace(group, readable=readable, bare=bare))
        return groups

    def _readable(
        self,
        teacher: TeacherPass | CommitteePass,
        index: int,
        domains: Sequence[int],
        samples: Sequence[int],
        labels: torch.Tensor,
    ) -> torch.Tensor | None:
        """Where all of a domain's teachers know the text of ``samples`` and the label, ``[k, s]``;
        None where they know it all."""
        found = None
        for own in teacher.passes:
            if own.unknown is None:
                continue
            taught = [i for i, d in enumerate(domains) if d in self.taught_by(own)]
            known = _of_samples((taught, own.readable(index)), samples)
            targets = labels.index_select(0, positions(samples, labels.device))
            known = known & ~torch.isin(targets, own.unknown)
            found = known if found is None else found & known
        return found

    @staticmethod
    def _bare(
        teacher: TeacherPass | CommitteePass,
        group: SampleGroup,
        states: Mapping[TeacherPass, tuple[Sequence[int], torch.Tensor]],
        bare_states: Mapping[TeacherPass, torch.Tensor],
    ) -> SampleGroup | None:
        """The group with teachers that read no prefix, where any did so in this step."""
        if not any(own in bare_states for own in teacher.passes):
            return None
        hidden = [
            _of_samples((states[own][0], bare_states.get(own, states[own][1])), group.samples)
            for own in teacher.passes
        ]
        if isinstance(teacher, CommitteePass):
            return dataclasses.replace(group, committee=teacher.committee(hidden))
        return dataclasses.replace(group, teacher_hidden=hidden[0])

    def _original_hidden(
        self, index: int, samples: Sequence[int], sequence_parallel: bool
    ) -> torch.Tensor:
        """The original model's states of general samples, ``[len(samples), s, h]``."""
        size = self._original_states[0].shape[1]
        places = [divmod(self._original_place[index, sample], size) for sample in samples]
        hidden = torch.stack([self._original_states[i][:, j] for i, j in places], dim=1)
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        return hidden.transpose(0, 1)

    def _states_by_sample(self, teacher: TeacherPass, index: int, domains: Sequence[int]):
        """Positions that ``teacher`` teaches in the micro-batch, and their states in order."""
        taught = self.taught_by(teacher)
        return [i for i, d in enumerate(domains) if d in taught], teacher.states(index)


def _of_samples(states: tuple[Sequence[int], torch.Tensor], samples: Sequence[int]) -> torch.Tensor:
    """Of a teacher's states and the positions they belong to, those of some positions."""
    taught, hidden = states
    rows = [taught.index(position) for position in samples]
    if rows == list(range(len(taught))):
        return hidden
    return hidden.index_select(0, positions(rows, hidden.device))
