"""How likely a model finds the answers of a step: a number for each token, no logits kept.

Shapes: n micro-batches, b samples each, m documents of a sample, s sequence, c context-parallel
size, h hidden, v vocabulary, p tensor-parallel size, k samples with answers on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Config, MegatronModule
from megatron_moe_inject.losses.head_rows import HeadRows, LowRankHead
from megatron_moe_inject.losses.preference import answer_log_probs
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.student import Student, Vocabulary


class Answers(NamedTuple):
    """What a pass has read: log-probabilities of labels float64 ``[s/c, k]``, and labels."""

    log_probs: torch.Tensor
    labels: torch.Tensor


NO_ANSWERS = Answers(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.int64))


def of_tokens(numbers: torch.Tensor, starts: torch.Tensor | None, length: int) -> torch.Tensor:
    """What is known of each document for each of its tokens, ``[n, b, s]``.

    Args:
        numbers: of the first m documents of every sample ``[n, b, m]``; the last of them is that of
            all behind it.
        starts: ``[n, b, s]``, where documents begin; ``None`` where a sample is one.
        length: s.
    """
    if starts is None:
        return numbers[..., :1].expand(*numbers.shape[:2], length)
    documents = starts.long().cumsum(-1) - 1
    return numbers.gather(-1, documents.clamp(max=numbers.shape[-1] - 1))


def sums_of_answers(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Sums over the tokens of each answer, float64 ``[count]``.

    Args:
        values: ``[s/c, k]``.
        rows: the answer of each token ``[k, s/c]``, -1 for none.
    """
    flat = rows.flatten()
    own = torch.where(flat >= 0, values.t().flatten().double(), 0.0)
    sums = own.new_zeros(count)
    return sums.index_add_(0, flat.clamp(min=0), own) if count else sums


class AnswerReader:
    """Reads the answers in the micro-batches of a forward pass, on the last pipeline stage.

    Args:
        vocabulary: the student's.
        tp_group: gathers states that are split under sequence parallelism; ``None`` if one rank.
        kernels: see ``losses.FusedOptions``.
        head: gives the model's head ``[v/p, h]`` of the student's; ``None`` = that itself.
        seam: has what changes the student's head; ``None`` of a model that has nothing of it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        tp_group: torch.distributed.ProcessGroup | None,
        kernels: RowKernels | str | None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seam: LossSeam | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._tp_group = tp_group
        self._kernels = kernels
        self._head = head
        self._seam = seam
        self.begin()

    def begin(self) -> None:
        """Before a pass."""
        self._log_probs: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def read(
        self,
        rows: Sequence[int],
        size: int,
        *,
        hidden_states: torch.Tensor,
        output_layer: MegatronModule,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        config: Config,
        **_: Any,
    ) -> None:
        """Look at a micro-batch: states ``[s/c(/p under SP), b, h]``, labels ``[b, s/c]``; packed
        with several samples it is one row of them.

        Args:
            rows: which of its samples have answers.
            size: b.

        Collectives, where there are any: under sequence parallelism one all-gather over the
        tensor-parallel group, and those of ``label_margins``.
        """
        if not rows:
            return
        head = output_layer.weight if output_weight is None else output_weight
        if self._head is None:  # else that layer's own value, which a hook would bring, is not used
            compat.run_forward_pre_hooks(output_layer, hidden_states)
        samples = index(rows, hidden_states.device)
        in_one_row = len(labels) != size
        hidden = hidden_states if in_one_row else hidden_states.index_select(1, samples)
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        if in_one_row:
            by_sample = hidden.view(size, -1, hidden.shape[-1])
            hidden = by_sample.index_select(0, samples).transpose(0, 1)
            labels = labels.view(size, -1)
        student = Student(
            hidden,
            head if self._head is None else self._head(head),
            labels.index_select(0, samples).t(),
            self._vocabulary,
            LogitTransform(scale=compat.logit_scale(config)),
            None if self._seam is None else HeadRows.given(self._seam.head_rows),
            None if self._seam is None else LowRankHead.given(self._seam.head_low_rank),
        )
        self._log_probs.append(answer_log_probs(student, self._kernels))
        self._labels.append(student.labels)

    def taken(self) -> Answers:
        """All samples with answers of the pass, in their order."""
        log_probs, labels = self._log_probs, self._labels
        self.begin()
        if not log_probs:
            return NO_ANSWERS
        return Answers(torch.cat(log_probs, dim=1), torch.cat(labels, dim=1))
