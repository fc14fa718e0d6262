"""How likely a model finds the answers of a step: sums over their tokens, no logits kept.

Shapes: s sequence (this context-parallel rank's part), b samples of a micro-batch, h hidden, v
vocabulary, p tensor-parallel size, k answers of the step on this rank.
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
from megatron_moe_inject.losses.preference import answer_sums
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.student import Student, Vocabulary


class Answers(NamedTuple):
    """What a pass has read: log-probabilities float64 ``[k]``, and labels ``[s, k]``."""

    log_probs: torch.Tensor
    labels: torch.Tensor


NO_ANSWERS = Answers(torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.int64))


class AnswerSums:
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
        self._sums: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def read(
        self,
        rows: Sequence[int],
        *,
        hidden_states: torch.Tensor,
        output_layer: MegatronModule,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        config: Config,
        **_: Any,
    ) -> None:
        """Look at a micro-batch: states ``[s(/p under SP), b, h]``, labels ``[b, s]``.

        Args:
            rows: which of its samples are answers.

        Collectives, where there are any: under sequence parallelism one all-gather over the
        tensor-parallel group, and those of ``label_margins``.
        """
        if not rows:
            return
        head = output_layer.weight if output_weight is None else output_weight
        if self._head is None:  # else that layer's own value, which a hook would bring, is not used
            compat.run_forward_pre_hooks(output_layer, hidden_states)
        answers = index(rows, hidden_states.device)
        hidden = hidden_states.index_select(1, answers)
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        student = Student(
            hidden,
            head if self._head is None else self._head(head),
            labels.index_select(0, answers).t(),
            self._vocabulary,
            LogitTransform(scale=compat.logit_scale(config)),
            None if self._seam is None else HeadRows.given(self._seam.head_rows),
            None if self._seam is None else LowRankHead.given(self._seam.head_low_rank),
        )
        self._sums.append(answer_sums(student, self._kernels))
        self._labels.append(student.labels)

    def taken(self) -> Answers:
        """All answers of the pass, in their order."""
        sums, labels = self._sums, self._labels
        self.begin()
        return Answers(torch.cat(sums), torch.cat(labels, dim=1)) if sums else NO_ANSWERS
