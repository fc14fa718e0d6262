"""Grouped GEMM with some experts of a layer frozen.

Transformer Engine's ``GroupedLinear`` asks its first weight alone whether weight gradients are
wanted, so mixed ``requires_grad`` flags train nothing, or everything. A layer whose local experts
are mixed runs in one piece, with weight gradients of its own (``grouped_whole.py``), unless some of
its weights are FP8 tensors: TE asks the first weight about that, too. Then it runs as two grouped
MLPs, one of the frozen and one of the trainable experts, each with grouped GEMMs of its own. The
stock module stays where it is and goes on owning every parameter: names, order, DDP buffers and
checkpoints are those of stock Megatron, and the two groups, which are no submodules of anything,
hold references to its parameters. Beside the extra kernel launches the price is one copy of the
rows in and one out.

Shapes: m rows (tokens times top-k on this rank), h hidden, E_l local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_moe_inject import compat
from megatron_moe_inject.experts.fp8_weights import is_fp8
from megatron_moe_inject.experts.freeze import decoder_layers, grouped_linears, local_weights
from megatron_moe_inject.experts.grouped_whole import train_whole
from megatron_moe_inject.rng import untouched_rng


def train_grouped_experts(chunks: Sequence[torch.nn.Module]) -> int:
    """Let every layer with frozen and trainable local experts in one grouped MLP train the latter.

    Must run after ``requires_grad`` is set and before DDP. No collective; the student's random
    number generators are as before.

    Returns:
        How many such layers this rank has.
    """
    count = 0
    for chunk in chunks:
        for layer in decoder_layers(chunk):
            experts = getattr(layer.mlp, "experts", None)
            linears = [] if experts is None else grouped_linears(experts)
            if not linears:
                continue
            trains = [weight.requires_grad for weight in local_weights(linears[0])]
            if not any(trains) or all(trains):
                continue
            if any(is_fp8(weight) for linear in linears for weight in local_weights(linear)):
                SplitExperts(layer.mlp, trains, compat.process_groups(chunk))
            else:
                train_whole(experts)
            count += 1
    return count


class SplitExperts:
    """Runs one MoE layer's grouped experts as a frozen and a trainable group.

    Args:
        layer: Megatron's ``MoELayer`` with grouped experts.
        trains: which local experts train, some and not all.
        groups: the student's ``ProcessGroupCollection``.
    """

    def __init__(self, layer: torch.nn.Module, trains: Sequence[bool], groups: Any) -> None:
        experts = layer.experts
        self._stock = experts
        self._ids = [[i for i, t in enumerate(trains) if t == kind] for kind in (False, True)]
        # Tuples hide the groups from torch's search for submodules.
        self._groups = tuple(_group(layer, ids, groups) for ids in self._ids)
        self._place = [0] * len(trains)
        for position, expert in enumerate(i for ids in self._ids for i in ids):
            self._place[expert] = position
        experts.forward = self.forward

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """As the stock module's: ``[m, h]`` rows in the order of local experts, ``[E_l]``, ``[m]``.

        Returns ``[m, h]`` and no bias.
        """
        counts = tokens_per_expert.tolist()
        states = permuted_local_hidden_states.split(counts)
        probs = permuted_probs.split(counts)
        outputs: list[torch.Tensor] = []
        for trains, ids, group in zip((False, True), self._ids, self._groups, strict=True):
            self._prepare(group, trains)
            chosen = [counts[i] for i in ids]
            output, bias = group(
                torch.cat([states[i] for i in ids]),
                torch.tensor(chosen, dtype=tokens_per_expert.dtype),
                torch.cat([probs[i] for i in ids]),
            )
            assert bias is None, "grouped experts add their own bias"
            outputs += output.split(chosen)
        for linear in grouped_linears(self._stock):
            if hasattr(linear, "is_first_microbatch"):
                linear.is_first_microbatch = False
        return torch.cat([outputs[place] for place in self._place]), None

    def _prepare(self, group: torch.nn.Module, trains: bool) -> None:
        """What Megatron tells the stock module, which nobody tells the group.

        Weights that do not train are quantised for FP8 products once, not in every step.
        """
        group.train(self._stock.training)
        pairs = zip(grouped_linears(self._stock), grouped_linears(group), strict=True)
        for stock, own in pairs:
            compat.run_forward_pre_hooks(stock)
            if hasattr(stock, "is_first_microbatch"):
                own.is_first_microbatch = stock.is_first_microbatch and trains


def _group(layer: torch.nn.Module, ids: Sequence[int], groups: Any) -> torch.nn.Module:
    """A grouped MLP of some of the layer's local experts, on the layer's own parameters."""
    stock = layer.experts
    with untouched_rng(local_weights(stock.linear_fc1)[0].device):
        group = layer.submodules.experts(len(ids), layer.config, pg_collection=groups)
    for own, theirs in zip(grouped_linears(group), grouped_linears(stock), strict=True):
        for kind in ("weight", "bias"):
            for position, expert in enumerate(ids):
                parameter = theirs._parameters.get(f"{kind}{expert}")
                if parameter is not None:
                    setattr(own, f"{kind}{position}", parameter)
    return group
