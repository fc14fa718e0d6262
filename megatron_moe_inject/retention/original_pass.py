"""The original model's forward pass of a step: over general samples, to hold them to it, and over
pairs of answers, which are measured against it.

It runs over these samples alone (``selected_pass``), with the original parameters swapped in. Of
general samples the hidden states are kept until the step's loss is taken.

Shapes: n micro-batches of the step, b samples each, s sequence (this context-parallel rank's part,
divided by the tensor-parallel size under sequence parallelism while it is kept), h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.host.step import Step
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.target import Dense
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.selected_pass import SelectedPass

Reader = Callable[..., None]
"""Is shown each micro-batch of a pass: which of its samples are answers of pairs, how many samples
it has, and by name what an output processor is given (``host.loss_seam``)."""


class OriginalPass:
    """Runs the original model over samples of each step and teaches the general ones from it.

    Args:
        originals: the original parameters of this rank.
        selected: runs a pass.
        holds: whether general samples are held to it.
        tp_group: gathers states that are split under sequence parallelism; ``None`` if one rank.
        packed: whether a micro-batch is one row of its samples; see ``data.packed``.

    Attributes:
        originals: as given.
        reader: where pairs of answers are measured against the original, what looks at each
            micro-batch of the pass, which then has them, too; on other stages than the last it is
            never called. None without.
    """

    def __init__(
        self,
        originals: OriginalParameters,
        selected: SelectedPass,
        *,
        holds: bool = True,
        tp_group: dist.ProcessGroup | None,
        packed: bool = False,
    ) -> None:
        self.originals = originals
        self.reader: Reader | None = None
        self._place: Mapping[tuple[int, int], int] = {}
        self._labels: list[int] = []
        self._passed = 0
        self._holds = holds
        self._packed = packed
        self._selected = selected
        self._tp_group = tp_group
        self._states: list[torch.Tensor] = []
        self._config: Any = None

    @property
    def holds(self) -> bool:
        """Whether general samples are held to the original, which runs with the teachers."""
        return self._holds

    def run(self, step: Step) -> None:
        """One forward-only pass.

        Collectives: those of ``SelectedPass.run``.
        """
        self._states = []
        classes = [GENERAL] if self._holds else []
        if self.reader is not None:
            classes.append(PREFERENCE)
        selected = torch.isin(step.labels, torch.tensor(classes))
        self._labels, self._passed = step.labels[selected].tolist(), 0
        running = self.originals.running
        self._place = self._selected.run(step, selected, self._keep, lambda rounds, size: running())

    def close(self) -> None:
        """After the step: let the states go."""
        self._states = []

    def _keep(
        self, *, hidden_states: torch.Tensor, labels: torch.Tensor, config: Any, **more: Any
    ) -> torch.Tensor:
        """The output processor of the pass: keep the states, form no logits of general samples."""
        self._config = config
        if self._holds:
            self._states.append(hidden_states.detach())
        if self.reader is not None:
            begin, size = self._passed * self._selected.size, self._selected.size
            of_rows = self._labels[begin : begin + size]
            rows = [row for row, label in enumerate(of_rows) if label == PREFERENCE]
            self.reader(
                rows, size, hidden_states=hidden_states, labels=labels, config=config, **more
            )
        self._passed += 1
        return hidden_states.new_zeros(labels.shape, dtype=torch.float32)

    def group(
        self, micro_batch: int, samples: Sequence[int], weights: TermWeights, head: torch.Tensor
    ) -> SampleGroup:
        """See ``teachers.step_teachers.OriginalTeacher.group``.

        Collectives: under sequence parallelism one all-gather over the tensor-parallel group.
        """
        size = self._selected.size
        places = [divmod(self._place[micro_batch, sample], size) for sample in samples]
        if self._packed and size > 1:
            hidden = self._of_rows(places)
        else:
            hidden = torch.stack([self._states[i][:, j] for i, j in places], dim=1)
            if self._config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        transform = LogitTransform(scale=compat.logit_scale(self._config))
        target = Dense(hidden.transpose(0, 1), self.originals.of(head), transform)
        return SampleGroup(samples, weights, target)

    def _of_rows(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """States ``[s, k, h]`` of samples, by micro-batch of the pass and place in its row."""
        rounds = sorted({i for i, _ in places})
        rows = torch.cat([self._states[i] for i in rounds], dim=1)
        if self._config.sequence_parallel:
            rows = gather_from_sequence_parallel_region(rows, group=self._tp_group)
        by_sample = rows.unflatten(0, (self._selected.size, -1))
        return torch.stack([by_sample[j, :, rounds.index(i)] for i, j in places], dim=1)
