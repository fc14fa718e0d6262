"""Rows of the vocabulary that train in the places of the embedding's and the output layer's own.

The stock matrices stay as they are. The rows are a parameter of their own, whole on every
tensor-parallel rank: in the embedding their values take the places of those tokens that have one of
their ids, and in the loss their logits take the places of those columns (``losses.HeadRows``), so
that no gradient of a whole matrix is ever made. Where embedding and output layer are one matrix, so
are the rows; on two pipeline stages both have a copy, whose gradients are summed as Megatron sums
those of the matrix.

Shapes: b samples, s sequence, h hidden, k rows, v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_moe_inject.adapters.uses import EMBEDDING_FORWARD, EMBEDDING_SHARDED, HEAD_SHARDED
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Chunk, Config, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import ADAPTER, VOCABULARY_ROWS
from megatron_moe_inject.host.wrap import Call, wrap_method


class TrainedIds(torch.nn.Module):
    """Rows of one embedding or output layer. A module, so that pre-hooks of Megatron's DDP run.

    Args:
        weight: the layer's part on this rank, ``[v/p, h]``.
        ids: global, rising.
        group: the tensor-parallel ranks that divide it.
        sequence: whether gradients are of a part of the sequence on each of them.
        divided: whether an embedding's output is such a part (``reduce_scatter_embeddings``).

    Attributes:
        on: whether they act.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        ids: Sequence[int],
        group: dist.ProcessGroup,
        *,
        sequence: bool,
        divided: bool,
    ) -> None:
        super().__init__()
        rows: Any = torch.nn.Parameter(
            torch.zeros(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
        )
        rows.allreduce = getattr(weight, "allreduce", True)
        rows.tensor_model_parallel = False
        rows.sequence_parallel = sequence
        self.rows = rows
        self.on = True
        self._group = group
        self._sequence = sequence
        self._divided = divided
        self._first = group.rank() * len(weight)
        self._mine = slice(
            bisect.bisect_left(ids, self._first),
            bisect.bisect_left(ids, self._first + len(weight)),
        )
        known = torch.tensor(ids)
        places = torch.full((len(weight) * group.size(),), -1)
        places[known] = torch.arange(len(ids))
        # Buffers, since Megatron moves the model to its device after this.
        self.register_buffer("ids", known.to(weight.device), persistent=False)
        self.register_buffer("places", places.to(weight.device), persistent=False)

    @torch.no_grad()
    def take(self, weight: torch.Tensor) -> None:
        """Begin as the layer's own rows.

        Collectives: one all-reduce of the rows over the tensor-parallel group.
        """
        self.rows.zero_()
        self.rows[self._mine] = weight[self.columns]
        if self._group.size() > 1:
            dist.all_reduce(self.rows.data, group=self._group)

    @property
    def columns(self) -> torch.Tensor:
        """``[k']`` int64: which of this rank's rows of the layer they are."""
        return self.get_buffer("ids")[self._mine] - self._first

    def forward(self, ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """An embedding's output with the rows in their places. No collective.

        Args:
            ids: ``[b, s]``.
            embedded: ``[b, s, h]``, or ``[s/p, b, h]`` where the embedding divides the sequence.
        """
        places, rows = self.get_buffer("places")[ids], self.rows
        if self._divided:
            places = places.t().chunk(self._group.size(), dim=0)[self._group.rank()].contiguous()
        elif self._sequence:
            rows = _Shared.apply(rows, self._group.size())
        spread = torch.arange(places.numel(), device=places.device).view_as(places) % len(rows)
        values = F.embedding(torch.where(places < 0, spread, places), rows)
        return torch.where((places >= 0).unsqueeze(-1), values, embedded)

    def of_head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Columns and values for the loss, ``losses.HeadRows``; ``None`` while they are off.

        Collectives: with p > 1 and without sequence parallelism, one all-reduce of the rows in the
        backward pass.
        """
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        if not self.on:
            return None
        compat.run_forward_pre_hooks(self)
        rows: torch.Tensor = self.rows
        if self._group.size() > 1 and not self._sequence:
            rows = copy_to_tensor_model_parallel_region(rows, group=self._group)
        return self.columns, rows[self._mine]


class _Shared(torch.autograd.Function):
    """Identity, for a gradient that all of n ranks have whole and that will be summed over them."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] / ctx.ranks, None


class OfLayer:
    """The rows of one embedding or output layer of a chunk.

    Args:
        module: Megatron's, with a weight.
        ids: global, rising.
        groups: the student's.
        config: the student's.
        stored: asks whether the checkpoint to be loaded or saved holds them.
        key: of the rows in checkpoints; ``None``: by the module's own prefix.
        is_copy: the first stage has these rows too, and they are counted there.
    """

    def __init__(
        self,
        module: MegatronModule,
        ids: Sequence[int],
        groups: Groups,
        config: Config,
        stored: Callable[[], bool],
        *,
        key: str | None = None,
        is_copy: bool = False,
    ) -> None:
        self.module, self._groups = module, groups
        self._stored, self._key, self._is_copy = stored, key, is_copy
        sequence = bool(config.sequence_parallel) and groups.tp.size() > 1
        divided = bool(getattr(module, "reduce_scatter_embeddings", False))
        self.rows = TrainedIds(module.weight, ids, groups.tp, sequence=sequence, divided=divided)
        if getattr(module.weight, "shared_embedding", False):
            # A bucket of its own, so that both stages divide it among their ranks alike.
            self.rows.rows.shared_embedding = True
        if is_copy:
            self.rows.rows.shared = True
        embeds = hasattr(module, "reduce_scatter_embeddings")
        if embeds:
            wrap_method(module, EMBEDDING_FORWARD, self._forward)
        wrap_method(module, EMBEDDING_SHARDED if embeds else HEAD_SHARDED, self._sharded)
        module.register_load_state_dict_post_hook(self._forgive)
        module.add_module(VOCABULARY_ROWS, self.rows)

    def _forward(self, call: Call) -> torch.Tensor:
        embedded = call()
        return self.rows(call["input_"], embedded) if self.rows.on else embedded

    def _forgive(self, module: torch.nn.Module, incompatible: Any) -> None:
        if not self._stored():
            missing = incompatible.missing_keys
            missing[:] = [key for key in missing if f"{VOCABULARY_ROWS}." not in key]

    def _sharded(self, call: Call) -> dict[str, Any]:
        """Stock's, with the rows under a key of their own, or without them."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state, prefix, metadata = call(), call["prefix"], call["metadata"] or {}
        local = f"{prefix}{VOCABULARY_ROWS}.rows"
        state.pop(local, None)
        if self._stored():
            (shard,) = make_sharded_tensors_for_checkpoint(
                {"": self.rows.rows},
                self._key or f"{prefix}{VOCABULARY_ROWS}",
                {},
                (),
                tp_group=self._groups.tp,
                dp_cp_group=metadata.get("dp_cp_group") or self._groups.dp_cp,
            ).values()
            if self._is_copy:
                shard.replica_id = (1, *shard.replica_id[1:])
            state[local] = shard
        return state


def of_chunk(
    chunk: Chunk, ids: Sequence[int], tied: bool, stored: Callable[[], bool]
) -> list[OfLayer]:
    """Give the layers of a bare chunk with a vocabulary their rows. No collective."""
    groups, config, layers = compat.process_groups(chunk), chunk.config, []
    embedding = getattr(getattr(chunk, "embedding", None), "word_embeddings", None)
    if chunk.pre_process and embedding is not None:
        layers.append(OfLayer(embedding, ids, groups, config, stored))
    head = getattr(chunk, "output_layer", None)
    if chunk.post_process and getattr(head, "weight", None) is not None:
        key = f"embedding.word_embeddings.{VOCABULARY_ROWS}" if tied else None
        copy = tied and not chunk.pre_process
        if not (tied and chunk.pre_process):
            layers.append(OfLayer(head, ids, groups, config, stored, key=key, is_copy=copy))
    return layers


def change_head(seam: LossSeam, chunk: Chunk) -> None:
    """Tell the loss what changes a bare chunk's output layer. No collective."""
    head, tied = chunk.output_layer, getattr(chunk, "embedding", None)
    for owner in (getattr(tied, "word_embeddings", None), head):
        rows = getattr(owner, VOCABULARY_ROWS, None)
        if rows is not None and (owner is head or head.weight is None):
            seam.head_rows = rows.of_head
    adapter = getattr(head, ADAPTER, None)
    if adapter is not None:
        seam.head_low_rank = adapter.of_head
