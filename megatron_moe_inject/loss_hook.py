"""The loss hook: the objective in the place of Megatron's cross-entropy.

It is the output processor (``host.loss_seam``) of the chunk with the output layer: it gets the
hidden states before any logits exist and returns one total loss per token. Micro-batches reach that
chunk in order in every schedule, so a counter tells which one is being processed; the loss
function that the script returned is wrapped to report the terms beside the total.

A trained head costs less if the gradient of the total will be one number times the loss mask, which
is so in Megatron's scripts (``upstream_mask`` of ``losses.FusedOptions``). In the first step
that trains, the loss function is asked for that gradient; another form ends the run with an error
that names the switch. Where only a later micro-batch shows it, the head's gradient becomes NaN.

Shapes: s sequence, b batch, h hidden, v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_moe_inject import losses
from megatron_moe_inject.data.packed import segments
from megatron_moe_inject.data.section import MIXING
from megatron_moe_inject.evaluation.measurement import Measurement
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Config, MegatronModule
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.losses.objective import TermWeights, injection_loss
from megatron_moe_inject.losses.report import LossReport, merge
from megatron_moe_inject.losses.spec import LogitTransform, TokenWeighting
from megatron_moe_inject.losses.triton_rows import AUTO
from megatron_moe_inject.losses.upstream import common_factor
from megatron_moe_inject.preference.held_out import HeldOutMeasurement
from megatron_moe_inject.preference.term import PreferenceTerm
from megatron_moe_inject.recipe.run_kinds import EVALUATION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import ever_positive
from megatron_moe_inject.recipe.weights import term_weights
from megatron_moe_inject.teachers.align.rules import aligned_domains
from megatron_moe_inject.teachers.confidence import RunningConfidence
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class LossHook(StepPart):
    """Computes the objective on the model chunk that holds the output layer.

    Args:
        seam: that chunk's.
        weights_at: the weights after that many optimizer steps, by domain index, and under
            ``host.labels.GENERAL`` those of general samples.
        teachers: those of the step; begun before this part.
        report: what to log.
        tp_group: group that shards the vocabulary.
        valid_vocab_size: number of ids that are not padding.
        masked_sum: the script's loss is the sum of the token losses times the loss mask, times one
            number.
        kernels: see ``losses.FusedOptions``.
        measurement: gets the micro-batches of evaluations that it is to measure.
        only_measures: the run trains nothing: the output is the measured cross-entropy.
        watch: is shown the states that the loss is computed from, and the loss.
        running_confidence: gets the micro-batches of training steps.
        cp_group: group that divides sequences.
        by_document: packed rows were divided among it document by document; see ``data.packed``.
        preference: weighs the answers of pairs; begun before this part.
        held_out: gets the micro-batches of evaluations of held-out pairs.

    Attributes:
        weights_at: as given.
    """

    def __init__(
        self,
        seam: LossSeam,
        weights_at: Callable[[int], Mapping[int, TermWeights]],
        teachers: StepTeachers,
        report: LossReport,
        *,
        tp_group: torch.distributed.ProcessGroup,
        valid_vocab_size: int,
        masked_sum: bool = True,
        kernels: str | None = AUTO,
        measurement: Measurement | None = None,
        only_measures: bool = False,
        watch: FiniteWatch | None = None,
        running_confidence: RunningConfidence | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
        by_document: bool = False,
        preference: PreferenceTerm | None = None,
        held_out: HeldOutMeasurement | None = None,
    ) -> None:
        self._preference = preference
        self._held_out = held_out
        self._cp_group = cp_group
        self._by_document = by_document
        self._watch = watch
        self._running_confidence = running_confidence
        self._measurement = measurement
        self._only_measures = only_measures
        self._seam = seam
        self.weights_at = weights_at
        self._weights: Mapping[int, TermWeights] = {}
        self._teachers = teachers
        self._report = report
        self._tp_group = tp_group if tp_group.size() > 1 else None
        self._vocabulary = losses.Vocabulary(self._tp_group, valid_vocab_size)
        self._labels: list[list[int]] = []
        self._next = 0
        self._masked_sum = masked_sum
        self._kernels = kernels
        self._checked = self._checking = False
        self._params_dtype: torch.dtype = torch.float32
        self._pending: deque[tuple[dict[str, torch.Tensor], torch.Tensor | None]] = deque()

    def begin(self, step: Step) -> None:
        """Take the seam, and let the script's loss function report our terms as well."""
        self._labels = step.labels.tolist()
        self._weights = self.weights_at(step.iteration)
        self._next = 0
        self._pending.clear()
        self._seam.process = self._process
        step.forward_step = self._wrap_forward_step(step.forward_step)

    def close(self) -> None:
        """Forward passes outside a step keep the stock output."""
        self._seam.process = None
        self._checked |= self._checking

    def _wrap_forward_step(self, forward_step: Callable) -> Callable:
        """The script's ``forward_step`` with its loss function reporting our terms as well."""

        @functools.wraps(forward_step)
        def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Callable]:
            output, loss_func = forward_step(*args, **kwargs)
            return output, self._wrap_loss_func(loss_func)

        return wrapped

    def _wrap_loss_func(self, loss_func: Callable) -> Callable:
        @functools.wraps(loss_func)
        def wrapped(output_tensor: torch.Tensor, **kwargs: Any) -> Any:
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
        if common_factor(gradient.flatten(), mask.flatten(), self._params_dtype).isnan():
            raise ValueError(
                "objective.masked_sum: true, but this script's loss is not the sum of the token "
                "losses times the loss mask, times one number; set objective.masked_sum: false "
                "(what trains of the output layer then costs more)"
            )

    def _process(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: MegatronModule,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        config: Config,
        **_: Any,
    ) -> torch.Tensor:
        """``output_processor`` of Megatron: ``[s(/p under SP), b, h]`` to total loss ``[b, s]``."""
        index, self._next = self._next, self._next + 1
        domains = self._labels[index]
        self._params_dtype = config.params_dtype
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
        transform = LogitTransform(scale=compat.logit_scale(config))
        student = losses.Student(
            hidden_states,
            head,
            labels.t(),
            self._vocabulary,
            transform,
            losses.HeadRows.given(self._seam.head_rows),
            losses.LowRankHead.given(self._seam.head_low_rank),
        )
        if self._held_out is not None and self._held_out.active:
            self._held_out.read(index, student)
            self._pending.append(({}, None))
            return labels.new_zeros(row, dtype=torch.float32)
        groups = self._teachers.groups(index, domains, labels, self._weights, head)
        running = self._running_confidence
        if running is not None and torch.is_grad_enabled():
            running.add(
                groups,
                labels,
                domains,
                self._vocabulary,
                loss_mask=loss_mask,
                kernels=self._kernels,
            )
        values: dict[str, torch.Tensor] = {}
        if self._measurement is not None and self._measurement.active:
            measured, values = self._measurement.micro_batch(
                index, student, loss_mask, domains, groups, kernels=self._kernels
            )
            if self._only_measures:
                values |= self._report.values(measured, loss_mask, domains)
                self._pending.append((values, None))
                return measured.total
        promise = self._masked_sum and student.head_trains and torch.is_grad_enabled()
        options = losses.FusedOptions(
            kernels=self._kernels,
            reduce_hidden_grad=not config.sequence_parallel,
            accumulate_main_grad=config.gradient_accumulation_fusion and head.requires_grad,
            upstream_mask=loss_mask.t() if promise else None,
        )
        if self._preference is not None:
            groups = self._preference.weighed(groups, index, domains)
        terms = injection_loss(student, groups, options)
        self._see("loss", terms.total)
        if self._preference is not None:
            terms = self._preference.attached(terms, domains, loss_mask)
        if self._watch is not None:
            name = "gradient of the states before the output layer"
            self._watch.see_gradient(name, hidden_states)
        values |= self._report.values(terms, loss_mask, domains)
        self._pending.append((values, loss_mask if promise else None))
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
        samples = segments(len(domains), labels.numel(), size, rank, by_document=self._by_document)
        hidden = hidden.view(len(samples), -1, hidden.shape[-1]).transpose(0, 1)
        labels, loss_mask = (x.reshape(len(samples), -1) for x in (labels, loss_mask))
        return hidden, labels, loss_mask, [domains[sample] for sample in samples]

    def _see(self, name: str, tensor: torch.Tensor) -> None:
        if self._watch is not None:
            self._watch.see(name, tensor)


class ObjectivePart(RunPart):
    """Puts the loss hook on the chunk that holds the output layer."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def attach(self, student: BuiltStudent) -> LossHook | None:
        """The hook, on the last stage."""
        run, recipe, seam = self._run, self._run.recipe, self._run.get(LossSeam)
        if seam is None:
            return None
        teachers, objective = run.need(StepTeachers), recipe.objective
        names = [domain.name for domain in recipe.domains]
        only_measures = run.kind == EVALUATION
        if only_measures:
            report = LossReport(names, teachers.domains, by_class=True)
        else:
            report = LossReport(
                names,
                distilled=teachers.domains,
                by_class=run.several_classes,
                weighted=bool(TokenWeighting(objective.confidence, objective.skip_worse)),
                retained=ever_positive(objective.gamma),
                shares=bool(recipe[MIXING]),
                aligned=aligned_domains(recipe),
            )
        weights = dict.fromkeys((GENERAL, *range(len(names))), TermWeights(0.0, 1.0))
        return LossHook(
            seam,
            lambda iteration: weights if only_measures else term_weights(recipe, iteration),
            teachers,
            report,
            tp_group=student.groups.tp,
            valid_vocab_size=run.valid_vocab_size,
            masked_sum=objective.masked_sum,
            kernels=objective.row_kernels(),
            measurement=run.get(Measurement),
            only_measures=only_measures,
            watch=run.get(FiniteWatch),
            running_confidence=run.get(RunningConfidence),
            cp_group=student.groups.cp,
            by_document=bool(getattr(run.args, "sft", False)),
            preference=run.get(PreferenceTerm),
            held_out=run.get(HeldOutMeasurement),
        )
