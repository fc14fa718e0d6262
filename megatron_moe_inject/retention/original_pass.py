"""The original model's forward pass of a step, for retention on general samples.

Megatron's own pipeline schedule runs forward only, with the original parameters swapped in, over
the step's general samples alone: they are packed into as few micro-batches as they fill, and these
are no larger than they need. The last stage keeps the hidden states before the head and forms no
logits. So retention costs the general share of one forward pass.

Shapes: n micro-batches of the step, b samples each, s sequence (this context-parallel rank's part,
divided by the tensor-parallel size under sequence parallelism while it is kept), h hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.host.step import MicroBatch, Step
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.target import Dense
from megatron_moe_inject.retention.originals import OriginalParameters


class OriginalPass:
    """Runs the original model over the general samples of each step and teaches them from it.

    Args:
        originals: the original parameters of this rank.
        seam: where the last stage's states come by, ``None`` on other stages.
        tp_group: gathers states that are split under sequence parallelism; ``None`` if one rank.
        stages: pipeline size under interleaving, else 1.
        group: micro-batches that an interleaved schedule runs through a chunk at a time
            (``--microbatch-group-size-per-virtual-pipeline-stage``), else 1.
        host_group: data-parallel ranks, over gloo, to agree on the number of micro-batches; None =
            one rank.
        whole: micro-batches keep their size, because ranks that read no data (tensor parallelism)
            expect it.
        same: keys whose values are the same for all samples, so that they need not be picked: a
            mask has s times the size of its tokens.
        packed: whether a micro-batch is one row of its samples; see ``data.packed``.
    """

    def __init__(
        self,
        originals: OriginalParameters,
        seam: LossSeam | None,
        *,
        tp_group: dist.ProcessGroup | None,
        stages: int,
        group: int,
        host_group: dist.ProcessGroup | None,
        whole: bool = True,
        same: Collection[str] = (),
        packed: bool = False,
    ) -> None:
        self.originals = originals
        self._packed = packed
        self._size = 0
        self._whole = whole
        self._same = frozenset(same)
        self._seam = seam
        self._tp_group = tp_group
        self._stages = stages
        self._group = group
        self._host_group = host_group
        self._states: list[torch.Tensor] = []
        self._place: dict[tuple[int, int], int] = {}
        self._config: Any = None

    def run(self, step: Step) -> None:
        """One forward-only pass; nothing runs where no rank has a general sample. Random numbers
        that it draws are not missing in training.

        Collectives: one all-reduce (maximum) of one number over the data-parallel ranks, since
        they share experts and each needs as many micro-batches as the fullest (ranks of one
        data-parallel index have the same samples); then those of the schedule.
        """
        general = step.labels == GENERAL
        self._place = {(n, b): i for i, (n, b) in enumerate(general.nonzero().tolist())}
        self._states = []
        count, size = self._agree(int(general.sum())), step.labels.shape[1]
        if count == 0:
            return
        rounds = allowed_rounds(-(-count // size), self._stages, self._group)
        if not self._whole:
            size = -(-count // rounds)
        self._size = size
        packed = [_packed(chunk, general, rounds, size, self._same) for chunk in step.batches]
        replay = [None if chunk is None else iter(chunk) for chunk in packed]
        model = step.arguments["model"]
        chunks = model if isinstance(model, list) else [model]
        seam = contextlib.nullcontext() if self._seam is None else self._seam.using(self._keep)
        alone = untouched_rng(next(chunks[0].parameters()).device)
        with torch.no_grad(), alone, _evaluating(chunks), self.originals.running(), seam:
            step.schedule(
                forward_step_func=_without_loss(step.forward_step),
                data_iterator=replay if len(replay) > 1 else replay[0],
                num_microbatches=rounds,
                micro_batch_size=size,
                seq_length=step.sequence_length,
                **step.arguments | {"forward_only": True},
            )

    def close(self) -> None:
        """After the step: let the states go."""
        self._states = []

    def _keep(
        self, *, hidden_states: torch.Tensor, labels: torch.Tensor, config: Any, **_: Any
    ) -> torch.Tensor:
        """The output processor of the pass: keep the states, form no logits."""
        self._config = config
        self._states.append(hidden_states.detach())
        return hidden_states.new_zeros(labels.shape, dtype=torch.float32)

    def group(
        self, micro_batch: int, samples: Sequence[int], weights: TermWeights, head: torch.Tensor
    ) -> SampleGroup:
        """See ``teachers.step_teachers.OriginalTeacher.group``.

        Collectives: under sequence parallelism one all-gather over the tensor-parallel group.
        """
        places = [divmod(self._place[micro_batch, sample], self._size) for sample in samples]
        if self._packed and self._size > 1:
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
        by_sample = rows.unflatten(0, (self._size, -1))
        return torch.stack([by_sample[j, :, rounds.index(i)] for i, j in places], dim=1)

    def _agree(self, count: int) -> int:
        if self._host_group is None:
            return count
        largest = torch.tensor([count])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(largest)


def allowed_rounds(least: int, stages: int, group: int) -> int:
    """The smallest number of micro-batches, from ``least`` on, that Megatron's schedules take.

    An interleaved one wants at least one whole group, and of the last group nothing or at least as
    many as there are stages. So the number is no larger than that of the step's micro-batches.
    """
    rounds = max(least, group)
    return rounds + max(0, stages - rounds % group) if rounds % group else rounds


def _packed(
    batches: list[MicroBatch] | None,
    general: torch.Tensor,
    rounds: int,
    size: int,
    same: Collection[str] = (),
) -> list[MicroBatch] | None:
    """The general samples as ``rounds`` micro-batches of ``size``, filled up with samples that do
    not count."""
    if batches is None:
        return None
    chosen = general.nonzero().tolist()
    chosen += [[0, 0]] * (rounds * size - len(chosen))
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    packed: list[MicroBatch] = [{} for _ in parts]
    for key, value in batches[0].items():
        values = [batch[key] for batch in batches]
        for micro_batch, places in zip(packed, parts, strict=True):
            if not isinstance(value, torch.Tensor):
                micro_batch[key] = value
            elif key in same:
                micro_batch[key] = value[:size]
            else:
                micro_batch[key] = samples_of(values, places)
    return packed


def _without_loss(forward_step: Callable) -> Callable:
    """The script's ``forward_step`` with a loss function that reports nothing."""

    def loss_func(
        output: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        tokens = torch.ones((), dtype=torch.int, device=output.device)
        return output.new_zeros(()), tokens, {}

    def wrapped(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Callable]:
        output, _ = forward_step(*args, **kwargs)
        return output, loss_func

    return wrapped


@contextlib.contextmanager
def _evaluating(chunks: Sequence[Chunk]) -> Iterator[None]:
    """Chunks in eval mode: no expert-bias counts, no dropout, no auxiliary losses."""
    training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
