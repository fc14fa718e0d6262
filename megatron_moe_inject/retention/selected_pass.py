"""A forward pass over some samples of a step, before the step's own schedule.

Megatron's own pipeline schedule runs forward only over the chosen samples alone: they are packed
into as few micro-batches as they fill, and these are no larger than they need. The last stage hands
the hidden states before the head to whoever wants them and forms no logits. So a pass costs the
share of the chosen samples of one forward pass.

Shapes: n micro-batches of the step, b samples each, s sequence (this context-parallel rank's part,
divided by the tensor-parallel size under sequence parallelism), h hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.host.agreement import host_twin
from megatron_moe_inject.host.forward_passes import allowed_rounds, evaluating
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.host.step import MicroBatch, Step
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext


class SelectedPass:
    """Runs a model over chosen samples of a step.

    Args:
        seam: where the last stage's states come by, ``None`` on other stages.
        stages: pipeline size under interleaving, else 1.
        group: micro-batches that an interleaved schedule runs through a chunk at a time
            (``--microbatch-group-size-per-virtual-pipeline-stage``), else 1.
        host_group: data-parallel ranks, over gloo, to agree on the number of micro-batches; None =
            one rank.
        whole: micro-batches keep their size, because ranks that read no data (tensor parallelism)
            expect it.
        same: keys whose values are the same for all samples, so that they need not be picked: a
            mask has s times the size of its tokens.
    """

    def __init__(
        self,
        seam: LossSeam | None,
        *,
        stages: int,
        group: int,
        host_group: dist.ProcessGroup | None,
        whole: bool = True,
        same: Collection[str] = (),
    ) -> None:
        self._whole = whole
        self._same = frozenset(same)
        self._seam = seam
        self._stages = stages
        self._group = group
        self._host_group = host_group
        self._size = 0

    @classmethod
    def of_run(cls, run: RunContext, student: BuiltStudent, *, packed: bool) -> SelectedPass:
        """The pass of a run's student.

        Args:
            packed: whether a micro-batch is one row of its samples; see ``data.packed``.

        Collectives: that of ``host_twin``.
        """
        groups, config = student.groups, student.chunks[0].config
        interleaved = len(student.chunks) > 1
        resets = {
            "position_ids": run.args.reset_position_ids,
            "attention_mask": run.args.reset_attention_mask,
        }
        return cls(
            run.get(LossSeam),
            stages=groups.pp.size() if interleaved else 1,
            group=config.microbatch_group_size_per_vp_stage if interleaved else 1,
            host_group=host_twin(groups.dp),
            whole=groups.tp.size() > 1,
            same=[key for key, reset in resets.items() if not (reset or packed)],
        )

    @property
    def size(self) -> int:
        """Samples of a micro-batch of the last pass."""
        return self._size

    def run(
        self,
        step: Step,
        selected: torch.Tensor,
        process: Callable[..., torch.Tensor],
        model: Callable[[int, int], contextlib.AbstractContextManager[Any]],
    ) -> Mapping[tuple[int, int], int]:
        """One forward-only pass; nothing runs where no rank has a chosen sample. Random numbers
        that it draws are not missing in training.

        Args:
            step: what the schedule and its data are taken of.
            selected: ``[n, b]`` bool on the host.
            process: the output processor of the pass, on the last stage.
            model: gives the block in which the pass runs, by the number and the size of its
                micro-batches.

        Returns:
            The place in the pass of each sample, by micro-batch and place in the step: place i is
            sample ``i % size`` of micro-batch ``i // size``.

        Collectives: one all-reduce (maximum) of one number over the data-parallel ranks, since
        they share experts and each needs as many micro-batches as the fullest (ranks of one
        data-parallel index have the same samples); then those of the schedule.
        """
        place = {(n, b): i for i, (n, b) in enumerate(selected.nonzero().tolist())}
        count, size = self._agree(int(selected.sum())), step.labels.shape[1]
        if count == 0:
            return place
        rounds = allowed_rounds(-(-count // size), self._stages, self._group)
        if not self._whole:
            size = -(-count // rounds)
        self._size = size
        packed = [_packed(chunk, selected, rounds, size, self._same) for chunk in step.batches]
        replay = [None if chunk is None else iter(chunk) for chunk in packed]
        given = step.arguments["model"]
        chunks = given if isinstance(given, list) else [given]
        seam = contextlib.nullcontext() if self._seam is None else self._seam.using(process)
        alone = untouched_rng(next(chunks[0].parameters()).device)
        with torch.no_grad(), alone, evaluating(chunks), model(rounds, size), seam:
            step.schedule(
                forward_step_func=_without_loss(step.forward_step),
                data_iterator=replay if len(replay) > 1 else replay[0],
                num_microbatches=rounds,
                micro_batch_size=size,
                seq_length=step.sequence_length,
                **step.arguments | {"forward_only": True},
            )
        return place

    def _agree(self, count: int) -> int:
        if self._host_group is None:
            return count
        largest = torch.tensor([count])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(largest)


def _packed(
    batches: list[MicroBatch] | None,
    selected: torch.Tensor,
    rounds: int,
    size: int,
    same: Collection[str] = (),
) -> list[MicroBatch] | None:
    """The chosen samples as ``rounds`` micro-batches of ``size``, filled up with samples that do
    not count."""
    if batches is None:
        return None
    chosen = selected.nonzero().tolist()
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
