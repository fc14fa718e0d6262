"""Proof that frozen means frozen: fingerprints before the first step against those at the end.

A fingerprint is an exact integer hash of a tensor's bits, computed where the tensor lives and
with wrap-around int64 arithmetic, so it costs one pass over the parameters and no copy of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.host.agreement import totals
from megatron_moe_inject.host.model_parts import (
    ROWS,
    places,
)

_BLOCK = 1 << 22
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


MAY_CHANGE = {
    "local_tokens_per_expert": "a router's counts of a step, zeroed after it",
    "global_tokens_per_expert": "a router's counts of a batch for the global balance loss",
    "ga_steps": "how many micro-batches those counts are of",
    "qb_beta_accum": "a router's sums for quantile balancing, zeroed after each step",
    "qb_beta_count": "how many micro-batches those sums are of",
    "cos_cached": "YaRN's cosines, made anew for longer sequences",
    "sin_cached": "its sines",
}
"""Buffers that may differ beside frozen parameters, and what they are; no other may.

What Transformer Engine keeps to scale by (histories of the largest values) lies in no buffer.
"""


def frozen_tensors(
    chunks: Iterable[torch.nn.Module],
    policy: FreezePolicy,
    rows: Mapping[int, Collection[int]] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers that the recipe freezes, by unique name.

    What is frozen is asked of the policy, never of flags on parameters or modules. A buffer is
    frozen where none of its module's own parameters trains; those of ``MAY_CHANGE`` are left out.

    Args:
        chunks: bare model chunks.
        policy: what trains.
        rows: of routers that are frozen otherwise, the rows that train, by 0-based global layer;
            the others are frozen.
    """
    rows = rows or {}
    for index, chunk in enumerate(chunks):
        trained = set()
        for place, parameter in places(chunk):
            if policy.trains(place):
                # A router's frozen matrix stands beside its rows that train, and so does its bias.
                if not place.name.endswith(f".{ROWS}"):
                    trained.add(place.name.rpartition(".")[0])
                continue
            name, value = f"chunk{index}.{place.name}", parameter.detach()
            if fp8_weights.is_fp8(parameter):
                stored = fp8_weights.stored(parameter)
                yield name, stored.codes
                yield f"{name} scales", stored.scales
            elif (
                place.layer is not None
                and place.layer in rows
                and place.name.endswith(".mlp.router.weight")
            ):
                frozen = torch.ones(len(value), dtype=torch.bool, device=value.device)
                frozen[sorted(rows[place.layer])] = False
                yield name, value[frozen]
            else:
                yield name, value
        for name, buffer in chunk.named_buffers():
            module, _, buffer_name = name.rpartition(".")
            if module not in trained and buffer_name not in MAY_CHANGE:
                yield f"chunk{index}.{name}", buffer.detach()


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """128-bit position-dependent hash of a tensor's bits, ``[2]`` int64 on its device.

    Each element's bits are mixed with its index by two odd multipliers (a multiply-xorshift
    step) and summed modulo 2**64; a changed bit or a swap of two elements changes the sum.
    """
    flat = tensor.contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].long()
        index = torch.arange(start + 1, start + 1 + block.numel(), device=tensor.device)
        for lane, odd in enumerate(_ODD):
            mixed = (block ^ (index * odd)) * odd
            total[lane] += ((mixed ^ (mixed >> 29)) * _ODD[1 - lane]).sum()
    return total


class FrozenChangedError(RuntimeError):
    """Something that is frozen is not what it was."""


class FrozenCheck:
    """Remembers the fingerprints of all frozen tensors of this rank.

    Args:
        chunks: bare model chunks, at the moment from which nothing frozen may change.
        policy, rows: what the recipe freezes; see ``frozen_tensors``.
    """

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        policy: FreezePolicy,
        rows: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._policy = policy
        self._rows = rows
        self._before = self._fingerprints()

    def _fingerprints(self) -> dict[str, torch.Tensor]:
        frozen = frozen_tensors(self._chunks, self._policy, self._rows)
        return {name: fingerprint(tensor).cpu() for name, tensor in frozen}

    def changed(self) -> list[str]:
        """Names of frozen tensors of this rank whose bits differ from the start."""
        after = self._fingerprints()
        names = self._before.keys() | after.keys()
        return sorted(
            name
            for name in names
            if name not in after
            or name not in self._before
            or not torch.equal(self._before[name], after[name])
        )

    def verify(self) -> str:
        """Check every rank and say so in one line.

        Collectives: one all-reduce of a few numbers over the whole world; where something changed,
        one all-gather of some names.

        Raises:
            FrozenChangedError: on every rank, if any rank holds a changed frozen tensor.
        """
        changed = self.changed()
        total, wrong = totals([len(self._before), len(changed)])
        if wrong:
            reports: list[list[str]] = [[]] * dist.get_world_size()
            dist.all_gather_object(reports, changed[:6])
            broken = [rank for rank, names in enumerate(reports) if names]
            names = reports[broken[0]]
            examples = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise FrozenChangedError(
                f"{wrong} frozen tensors changed during training on ranks {broken}; "
                f"first on rank {broken[0]}: {examples}"
            )
        ranks = dist.get_world_size()
        return f"frozen check: {total} frozen tensors on {ranks} ranks bitwise unchanged"
