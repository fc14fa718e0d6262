"""The injection objective on one micro-batch: distillation on domain samples, CE on all.

    total = alpha * factor * T^2 * D(teacher || student) + beta * CE        per token

with alpha = 0 on general samples and factor = 1 without a token weighting. Samples that share a
teacher and weights form one group and one call of the fused loss, so a micro-batch that holds one
kind of sample is one call.

Shapes: s sequence (this context-parallel rank's part), b batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_moe_inject.host.indices import index
from megatron_moe_inject.losses.aligned import aligned_loss
from megatron_moe_inject.losses.fused import DEFAULT, FusedLoss, FusedOptions, fused_loss
from megatron_moe_inject.losses.spec import TermWeights
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.target import Aligned, Target


@dataclass(frozen=True)
class SampleGroup:
    """Samples of a micro-batch that share weights and teacher.

    Attributes:
        samples: their positions in the batch dimension.
        weights: how their loss is composed.
        target: what their teacher says about them, tensors per token ``[len(samples), s, ...]``;
            None without a teacher.
        readable: ``[len(samples), s]`` bool, where the teacher can be asked: it knows every token
            so far and the label. None where it can everywhere.
        bare: what the teacher says when it reads the text without its prefix, for a comparison.
    """

    samples: Sequence[int]
    weights: TermWeights
    target: Target | None = None
    readable: torch.Tensor | None = None
    bare: Target | None = None

    @property
    def taught(self) -> bool:
        """Whether the samples have a teacher."""
        return self.target is not None


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
    student: Student, groups: Sequence[SampleGroup], options: FusedOptions = DEFAULT
) -> LossTerms:
    """Loss of one micro-batch from its hidden states.

    Args:
        student: hidden states ``[s, b, h]`` before the output layer, not sequence-sharded, and
            labels ``[s, b]``.
        groups: a partition of the batch positions.
        options: see ``fused_loss``; ``upstream_mask`` is ``[s, b]``.

    Collectives: those of ``fused_loss`` or ``aligned_loss``, once per group.
    """
    hidden = student.hidden
    order = [i for group in groups for i in group.samples]
    assert sorted(order) == list(range(hidden.shape[1])), "groups must partition the batch"
    parts, limited = [], any(group.readable is not None for group in groups)
    for group in groups:
        rows, labels, mask = hidden, student.labels, options.upstream_mask
        if len(groups) > 1:
            samples = index(group.samples, hidden.device)
            rows, labels = rows.index_select(1, samples), labels.index_select(1, samples)
            mask = None if mask is None else mask.index_select(1, samples)
        readable = None if group.readable is None else group.readable.t().flatten()
        loss = _loss(
            replace(student, hidden=rows.flatten(0, 1), labels=labels.flatten()),
            None if group.target is None else group.target.changed(_by_position),
            _weights(group, readable),
            replace(options, upstream_mask=None if mask is None else mask.flatten()),
        )
        shape = (hidden.shape[0], len(group.samples))
        terms = [loss.total, loss.ce, loss.kd, loss.kd_factor]
        if readable is not None:
            terms[2:] = [term.masked_fill(~readable, 0) for term in terms[2:]]
        if limited:
            is_readable = (
                torch.ones_like(loss.ce, dtype=torch.bool) if readable is None else readable
            )
            terms.append(is_readable)
        parts.append([term.view(shape).t() for term in terms])
    if len(parts) == 1:
        total, *others = parts[0]
        return LossTerms(total.contiguous(), *others)
    place = {sample: at for at, sample in enumerate(order)}
    position = index((place[sample] for sample in range(len(order))), hidden.device)
    return LossTerms(
        *(torch.cat(terms).index_select(0, position) for terms in zip(*parts, strict=True))
    )


def _loss(
    student: Student, target: Target | None, weights: TermWeights, options: FusedOptions
) -> FusedLoss:
    if isinstance(target, Aligned):
        return aligned_loss(student, target, weights, options)
    return fused_loss(student, target, weights, options)


def _weights(group: SampleGroup, readable: torch.Tensor | None) -> TermWeights:
    """Those of a group: nothing is distilled where ``readable`` ``[t]`` is False."""
    weights = group.weights
    if readable is not None and weights.alpha != 0:
        weights = replace(weights, alpha=weights.alpha * readable.float())
    return weights if group.taught else replace(weights, weighting=None)


def _by_position(states: torch.Tensor) -> torch.Tensor:
    """``[b, s, ...]`` in the order of the student's tokens, ``[s * b, ...]``."""
    return states.transpose(0, 1).flatten(0, 1)
