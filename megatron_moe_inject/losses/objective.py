"""The injection objective on one micro-batch: distillation on domain samples, CE on all.

    total = alpha * factor * T^2 * D(teacher || student) + beta * CE        per token

with alpha = 0 on general samples and factor = 1 without a token weighting. Samples that share a
teacher and weights form one group and one call of the fused loss, so a micro-batch that holds one
kind of sample is one call.

Shapes: s sequence (this context-parallel rank's part), b batch, h hidden, h_t teacher hidden,
v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_moe_inject.host.indices import index
from megatron_moe_inject.losses.committee import Committee
from megatron_moe_inject.losses.fused import fused_linear_distillation
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, TokenWeighting
from megatron_moe_inject.losses.triton_rows import AUTO

_FORWARD_KL = Divergence("forward_kl")


@dataclass(frozen=True)
class TermWeights:
    """How terms of one kind of sample are weighted and shaped; see ``recipe.schema.Objective``."""

    alpha: float
    beta: float
    divergence: Divergence = _FORWARD_KL
    temperature: float = 1.0
    weighting: TokenWeighting | None = None


@dataclass(frozen=True)
class SampleGroup:
    """Samples of a micro-batch that share weights and teacher.

    Attributes:
        samples: their positions in the batch dimension.
        weights: how their loss is composed.
        teacher_hidden: ``[len(samples), s, h_t]`` pre-head states, ``None`` without a teacher.
        teacher_head: ``[v/p, h_t]``, ``None`` without a teacher.
        teacher_transform: what the teacher does to its logits.
        committee: several teachers in place of one, each with hidden states
            ``[len(samples), s, h_k]``.
        readable: ``[len(samples), s]`` bool, where the teachers can be asked: they know every token
            so far and the label. None where they can everywhere.
        bare: the same with teachers that read the text without their prefix, for a comparison.
    """

    samples: Sequence[int]
    weights: TermWeights
    teacher_hidden: torch.Tensor | None = None
    teacher_head: torch.Tensor | None = None
    teacher_transform: LogitTransform | None = None
    committee: Committee | None = None
    readable: torch.Tensor | None = None
    bare: SampleGroup | None = None

    @property
    def taught(self) -> bool:
        """Whether the samples have a teacher."""
        return self.teacher_hidden is not None or self.committee is not None


@dataclass(frozen=True)
class LossTerms:
    """Per-token losses ``[b, s]`` in fp32; ``total`` carries the graph, the others are detached.

    ``kd`` is T^2 * D, unweighted and 0 for samples without a teacher; ``ce`` is unweighted.
    ``kd_factor`` is what the token weighting left of the distillation, 1 without one. Both are 0
    where ``readable`` is False, which is None where teachers can be asked everywhere.
    """

    total: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    kd_factor: torch.Tensor
    readable: torch.Tensor | None = None


def injection_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[SampleGroup],
    *,
    tp_group: torch.distributed.ProcessGroup | None,
    valid_vocab_size: int | None,
    reduce_hidden_grad: bool,
    accumulate_main_grad: bool = False,
    chunk_tokens: int | None = None,
    student_transform: LogitTransform | None = None,
    upstream_mask: torch.Tensor | None = None,
    kernels: RowKernels | str | None = AUTO,
) -> LossTerms:
    """Loss of one micro-batch from its hidden states.

    Args:
        hidden: ``[s, b, h]`` student states before the output layer, not sequence-sharded.
        head: ``[v/p, h]`` this rank's rows of the student's output layer.
        labels: ``[b, s]``.
        groups: a partition of the batch positions.
        tp_group: group over which the vocabulary is sharded, ``None`` if it is not.
        valid_vocab_size: ids from here on are padding and get no probability in D.
        reduce_hidden_grad: see ``fused_linear_distillation``.
        accumulate_main_grad: see ``fused_linear_distillation``.
        chunk_tokens: see ``fused_linear_distillation``.
        student_transform: what the student does to its logits.
        upstream_mask: ``[b, s]``, see ``fused_linear_distillation``.
        kernels: see ``fused_linear_distillation``.

    Collectives: those of ``fused_linear_distillation``, once per group.
    """
    order = [i for group in groups for i in group.samples]
    assert sorted(order) == list(range(labels.shape[0])), "groups must partition the batch"
    parts, limited = [], any(group.readable is not None for group in groups)
    for group in groups:
        rows, targets, mask = hidden, labels, upstream_mask
        if len(groups) > 1:
            own = index(group.samples, hidden.device)
            rows, targets = hidden.index_select(1, own), labels.index_select(0, own)
            mask = None if mask is None else mask.index_select(0, own)
        if mask is not None:
            mask = mask.t().flatten()
        teacher_rows, committee = None, group.committee
        if group.teacher_hidden is not None:
            teacher_rows = _by_position(group.teacher_hidden)
        if committee is not None:
            committee = committee.changed(_by_position)
        alpha = group.weights.alpha
        readable = None if group.readable is None else group.readable.t().flatten()
        if readable is not None and alpha != 0:
            alpha = alpha * readable.float()
        loss = fused_linear_distillation(
            rows.flatten(0, 1),
            head,
            teacher_rows,
            group.teacher_head,
            targets.t().flatten(),
            kind=group.weights.divergence.kind,
            jsd_beta=group.weights.divergence.beta,
            skew=group.weights.divergence.skew,
            weighting=group.weights.weighting if group.taught else None,
            student_transform=student_transform,
            teacher_transform=group.teacher_transform,
            committee=committee,
            temperature=group.weights.temperature,
            alpha=alpha,
            beta=group.weights.beta,
            tp_group=tp_group,
            valid_vocab_size=valid_vocab_size,
            chunk_tokens=chunk_tokens,
            reduce_hidden_grad=reduce_hidden_grad,
            accumulate_main_grad=accumulate_main_grad,
            upstream_mask=mask,
            kernels=kernels,
        )
        shape = (hidden.shape[0], len(group.samples))
        terms = [loss.total, loss.ce, loss.kd, loss.kd_factor]
        if readable is not None:
            terms[2:] = [term.masked_fill(~readable, 0) for term in terms[2:]]
        if limited:
            asked = torch.ones_like(loss.ce, dtype=torch.bool) if readable is None else readable
            terms.append(asked)
        parts.append([term.view(shape).t() for term in terms])
    if len(parts) == 1:
        total, *others = parts[0]
        return LossTerms(total.contiguous(), *others)
    place = {sample: at for at, sample in enumerate(order)}
    position = index((place[sample] for sample in range(len(order))), hidden.device)
    return LossTerms(
        *(torch.cat(terms).index_select(0, position) for terms in zip(*parts, strict=True))
    )


def _by_position(states: torch.Tensor) -> torch.Tensor:
    """``[b, s, h]`` in the order of the student's tokens, ``[s * b, h]``."""
    return states.transpose(0, 1).flatten(0, 1)
