"""One number for each token, sent to where the token's rows went.

After a token dispatcher has sent its tokens to their experts, a narrow column goes the same way by
what the dispatcher has kept of it: the order of the rows, and how many go where. These are on the
host already where they need to be, so nothing waits.

Shapes: t tokens of this rank, m rows that its experts get.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def dispatched(dispatcher: Any, values: torch.Tensor, rows_of: torch.Tensor) -> torch.Tensor:
    """What ``values`` are at the rows that local experts get, float32 ``[m]``, in their order.

    To be called between the dispatcher's ``dispatch_postprocess`` and its combine step.

    Args:
        dispatcher: Megatron's ``alltoall`` or ``allgather`` token dispatcher.
        values: ``[t]``, small whole numbers.
        rows_of: how many rows each local expert gets, on the host.

    Collectives: of one float32 per row an all-to-all over the expert-parallel group and, under
    expert tensor parallelism, an all-gather; with ``allgather`` one all-gather of t float32 over
    both groups. None where the groups have one rank.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

    column = values.float().unsqueeze(1)
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        return _by_gather(dispatcher, column, int(rows_of.sum())).squeeze(1)
    return _by_exchange(dispatcher, column).squeeze(1)


def _by_gather(dispatcher: Any, column: torch.Tensor, count: int) -> torch.Tensor:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    if dispatcher.tp_size > 1 or dispatcher.ep_size > 1:
        column = gather_from_sequence_parallel_region(column, group=dispatcher.tp_ep_group)
    return _permuted(dispatcher, column, dispatcher.local_map, count)


def _by_exchange(dispatcher: Any, column: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    rows = _permuted(dispatcher, column, dispatcher.routing_map, dispatcher.num_out_tokens)
    rows = all_to_all(dispatcher.ep_group, rows, dispatcher.output_splits, dispatcher.input_splits)
    if dispatcher.tp_size > 1:
        splits = dispatcher.output_splits_tp
        rows = gather_from_sequence_parallel_region(
            rows,
            group=dispatcher.tp_group,
            output_split_sizes=None if splits is None else splits.tolist(),
        )
    if dispatcher.num_local_experts == 1:
        return rows
    if dispatcher.drop_and_pad:
        by_rank = rows.view(-1, dispatcher.num_local_experts, dispatcher.capacity)
        return by_rank.transpose(0, 1).reshape(-1, 1)
    rows, _ = sort_chunks_by_idxs(
        rows,
        dispatcher.num_global_tokens_per_local_expert.ravel(),
        dispatcher.sort_input_by_local_experts,
        fused=dispatcher.config.moe_permute_fusion,
    )
    return rows


def _permuted(
    dispatcher: Any, column: torch.Tensor, routing_map: torch.Tensor, count: Any
) -> torch.Tensor:
    """Rows in the order in which the dispatcher has put those of its tokens."""
    from megatron.core.transformer.moe.moe_utils import permute

    if not dispatcher.config.moe_permute_fusion:
        return column.index_select(0, dispatcher.reversed_local_input_permutation_mapping)
    return permute(column, routing_map, num_out_tokens=count, fused=True)[0]
